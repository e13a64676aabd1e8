"""Measurements that explain a run; switched off they cost nothing."""
