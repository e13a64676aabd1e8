"""The mesh tests on whatever devices are present: `python -m tests.devices`."""
