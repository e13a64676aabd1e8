"""What exists only to repeat a quirk of a released code: for replays, not for new work.

The methods are those of `jaxopt_lab.optim` and `jaxopt_lab.schedules`; here stand the values of
their internals that only a reproduction sets, one file a method.
"""
