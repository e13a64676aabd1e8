"""Shared test set-up: eight CPU devices, shape annotations enforced, reproducible examples.

Programs stay for the modules that come after, and are released where a worker holds half of as many
as it may; one that holds too many fails the run.
"""

import gc
import os
import signal

from tests.quick_compile import FLAGS

# Before jax starts: sharding tests need eight devices; everything else uses the first.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8" + FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all the time of the suite goes to compiling tiny programs that run for milliseconds. This
# turns off the expensive passes of LLVM alone, and `FLAGS` takes the faster way to it: the program
# XLA hands on, collectives, fusions and memory included, is the one users get. Processes that tests
# start inherit it; "0" and XLA_FLAGS of one's own compile as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests send Ctrl-C. What a shell runs in its background ignores that, and so would our programs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jaxtyping
import pytest

from tests import examples, programs

# Annotations of `core`, array shapes included, are enforced while the tests run.
jaxtyping.install_import_hook("jaxopt_lab.core", "beartype.beartype")

examples.register_profiles()

_RECORDS = pytest.StashKey[dict[str, programs.Record]]()


# Tracing makes many small objects, few of them in cycles: of its time every eleventh second went to
# looking for those. `programs.release` looks for all.
gc.set_threshold(200_000, 20, 100)


def pytest_collection_finish():
    gc.freeze()  # what is imported stays, and need not be looked at again


def pytest_configure(config):
    config.stash[_RECORDS] = {"this process": programs.Record()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    # Outside of all fixtures, so that what they hold is gone.
    outcome = yield
    record = item.config.stash[_RECORDS]["this process"]
    try:
        record.measure(item.nodeid)
    finally:
        if programs.memory_maps() > record.limit // 2:
            programs.release()
    return outcome


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        record = session.config.stash[_RECORDS]["this process"]
        session.config.workeroutput["programs"] = vars(record)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if found := getattr(node, "workeroutput", {}).get("programs"):
        record = programs.Record()
        vars(record).update(found)
        node.config.stash[_RECORDS][node.gateway.id] = record


def pytest_terminal_summary(terminalreporter, config):
    for name, record in config.stash[_RECORDS].items():
        if record.maps_after:
            terminalreporter.write_line(
                f"{name}: at most {record.maps} memory maps of {record.limit} (after "
                f"{record.maps_after}), {record.threads} threads (after {record.threads_after})"
            )
