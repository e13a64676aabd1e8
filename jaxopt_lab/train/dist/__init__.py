"""Devices and processes: the mesh, how a batch lies on it, what processes agree on."""
