"""Run logs, figures and tables; imports nothing else of the library."""
