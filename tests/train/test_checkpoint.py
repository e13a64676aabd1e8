import errno
import hashlib
import json
import os
import resource
import shutil
import tempfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.dist.mesh import make_mesh, to_global
from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.io import digests, retention
from jaxopt_lab.train.io.checkpoints import Checkpoints, committed_steps
from jaxopt_lab.train.io.stored import read_leaves, select_step
from jaxopt_lab.train.leaves import first_difference
from jaxopt_lab.train.step import make_step
from tests.train import stand_in


def small_tree(value=0.0, width=8):
    return {
        "w": jnp.full((width, 4), float(value)),
        "half": jnp.full((3,), value, jnp.bfloat16),
        "count": jnp.int32(value),
        "key": jax.random.key(int(value)),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def equal(a, b):
    def same(x, y):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))

    return jax.tree.all(jax.tree.map(same, a, b))


def save_all(directory, steps, *, losses=None, **kwargs):
    with Checkpoints(directory, **kwargs) as checkpoints:
        for step in steps:
            loss = None if losses is None else losses.get(step)
            checkpoints.save(step, small_tree(step), {"step": step}, held_out_loss=loss)
            if loss is None or np.isfinite(loss):
                checkpoints.verify(step, finite=True)
    return directory / "checkpoints"


def test_state_keys_and_data_position_come_back_bitwise(tmp_path):
    save_all(tmp_path, [1, 2])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(small_tree()))
    assert restored.step == 2 and restored.data == {"step": 2}
    assert equal(restored.state, small_tree(2))


def test_newest_and_best_stay(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5}
    save_all(tmp_path, range(1, 8), losses=losses, keep_newest=2, keep_best=1)
    assert committed_steps(tmp_path / "checkpoints") == [2, 6, 7]
    # The best one is still known to a run that is resumed.
    with Checkpoints(tmp_path, keep_newest=2, keep_best=1) as checkpoints:
        checkpoints.save(8, small_tree(8), {}, held_out_loss=1.5)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7, 8]  # until a loss has verified the last
        checkpoints.verify(8, finite=True)
    assert committed_steps(tmp_path / "checkpoints") == [2, 7, 8]


def test_a_label_that_exists_is_left_alone(tmp_path):
    save_all(tmp_path, [3])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, small_tree(9), {})
        assert equal(checkpoints.restore(abstract(small_tree())).state, small_tree(3))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {"w": jnp.zeros((8, 5))}, r"w is float32\(8,4\) in the checkpoint and floa"),
        (lambda t: t | {"half": jnp.zeros((3,))}, r"half is bfloat16\(3\) .* float32\(3\) in this"),
        (lambda t: t | {"extra": jnp.zeros(())}, "extra is missing in the checkpoint"),
        (lambda t: {k: v for k, v in t.items() if k != "half"}, "half is in the checkpoint and no"),
    ],
)
def test_another_model_names_the_first_leaf_that_differs(tmp_path, change, named):
    directory = save_all(tmp_path, [1, 2])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match=named):
        checkpoints.restore(abstract(change(small_tree())))
    assert committed_steps(directory) == [1, 2]  # it is not damaged, only foreign


def test_another_optimizer_names_the_first_leaf_that_differs(tmp_path):
    params = {"w": jnp.zeros((2, 2))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"opt_state": optax.adam(1e-3).init(params)}, {})
        with pytest.raises(CheckpointError, match="opt_state/trace/w is missing"):
            checkpoints.restore(abstract({"opt_state": optax.trace(0.9).init(params)}))


def test_what_is_not_read_need_not_be_what_it_was(tmp_path):
    # As a state of an earlier version: one field less than today, one of another shape.
    weights = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": weights, "opt_state": (jnp.zeros(5),)}, {})
    read = read_leaves(tmp_path, 1, {"params": jax.tree.map(np.empty_like, weights)})
    assert read.keys() == {"params"} and equal(read["params"], weights)
    named = "params/w is float32\\(2,3\\) in the checkpoint and float32\\(4,3\\) in this run"
    with pytest.raises(CheckpointError, match=named):
        read_leaves(tmp_path, 1, {"params": weights | {"w": np.empty((4, 3), np.float32)}})
    with pytest.raises(CheckpointError, match="opt_state/0 .* --fork-from RUN starts a new run"):
        with Checkpoints(tmp_path) as checkpoints:
            state = {"params": weights, "opt_state": (jnp.zeros(6),)}
            checkpoints.restore(abstract(state))


def test_first_difference_of_equal_descriptions_is_none():
    assert first_difference([["a", [2], "f"]], [["a", [2], "f"]]) is None


def files_of(checkpoint):
    """All files with content, the digests included."""
    return sorted(f for f in checkpoint.rglob("*") if f.is_file() and f.stat().st_size)


def restore_and_notes(run, target):
    notes = []
    with Checkpoints(run, message=notes.append) as checkpoints:
        return checkpoints.restore(abstract(target)), notes


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_every_truncated_file_is_noticed_and_the_previous_checkpoint_taken(tmp_path, keep):
    directory = save_all(tmp_path / "whole", [1, 2], losses={1: 1.0, 2: 2.0})
    names = [file.relative_to(directory) for file in files_of(directory / "2")]
    assert len(names) > 8
    for number, name in enumerate(names):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", run)
        path = run / "checkpoints" / name
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        notes = []
        with Checkpoints(run, message=notes.append) as checkpoints:
            restored = checkpoints.restore(abstract(small_tree()))
        assert restored.step == 1 and equal(restored.state, small_tree(1)), name
        assert len(notes) == 1 and path.name in notes[0] and "checkpoint 1" in notes[0]


def test_a_missing_file_is_noticed(tmp_path):
    directory = save_all(tmp_path, [1, 2])
    files_of(directory / "2")[-1].unlink()
    notes = []
    with Checkpoints(tmp_path, message=notes.append) as checkpoints:
        assert checkpoints.restore(abstract(small_tree())).step == 1
    assert "is missing" in notes[0]


@pytest.mark.parametrize("which", ["data/data.json", "_DIGESTS-0-of-1.json"])
def test_a_file_that_is_a_directory_now_is_damage(tmp_path, which):
    directory = save_all(tmp_path, [1, 2])
    (directory / "2" / which).unlink()
    (directory / "2" / which).mkdir()
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 1 and len(notes) == 1 and which.split("/")[0] in notes[0]


@pytest.mark.parametrize(
    ("number", "damage"), [(errno.EIO, True), (errno.EACCES, False), (errno.ENOMEM, False)]
)
def test_a_bad_sector_is_damage_and_missing_rights_are_not(tmp_path, monkeypatch, number, damage):
    directory = save_all(tmp_path, [1, 2])
    usual = hashlib.file_digest

    def read(file, algorithm):
        if "/checkpoints/2/state" in file.name:
            raise OSError(number, os.strerror(number))
        return usual(file, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", read)
    if damage:
        restored, notes = restore_and_notes(tmp_path, small_tree())
        assert restored.step == 1 and "Input/output error" in notes[0]
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            restore_and_notes(tmp_path, small_tree())
        assert committed_steps(directory) == [1, 2]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_damage_is_set_aside_where_the_checkpoints_lie_on_another_device(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (tmp_path / "checkpoints").symlink_to(elsewhere)
        directory = save_all(tmp_path, [1, 2])
        files_of(directory / "2")[0].unlink()
        assert restore_and_notes(tmp_path, small_tree())[0].step == 1
        assert [path.name for path in (directory / "damaged").iterdir()] == ["2-0"]


def test_everything_is_on_the_disk_before_a_checkpoint_counts(tmp_path, monkeypatch):
    synced, usual = [], os.fsync

    def fsync(descriptor):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), directory))
        usual(descriptor)

    directory = tmp_path / "checkpoints" / "1"
    monkeypatch.setattr(os, "fsync", fsync)
    save_all(tmp_path, [1])
    *before, sealed, names, parent = synced
    assert (sealed, names, parent) == ("_DIGESTS-0-of-1.json.partial", ".", "..")
    files = {str(file.relative_to(directory)) for file in files_of(directory)}
    assert files - {"_DIGESTS-0-of-1.json"} <= set(before)
    assert {str(path.parent.relative_to(directory)) for path in files_of(directory)} <= set(before)


def flip_a_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_the_previous_checkpoint_taken(tmp_path):
    """Each file, once in the middle and once at a random place."""
    rng = np.random.default_rng(0)
    directory = save_all(tmp_path / "whole", [1, 2], losses={1: 1.0, 2: 2.0})
    for number, file in enumerate(files_of(directory / "2")):
        bits = 8 * file.stat().st_size
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", run)
        damaged = run / "checkpoints" / file.relative_to(directory)
        flip_a_bit(damaged, bits // 2 if number % 2 else int(rng.integers(bits)))
        restored, notes = restore_and_notes(run, small_tree())
        assert restored.step == 1 and equal(restored.state, small_tree(1)), file
        assert (
            len(notes) == 1 and file.name in notes[0] and "going on with checkpoint 1" in notes[0]
        )


@pytest.mark.slow
def test_sixty_flipped_bits_none_silent(tmp_path):
    directory = save_all(tmp_path / "whole", [1, 2], losses={1: 1.0, 2: 2.0})
    rng = np.random.default_rng()
    files = files_of(directory / "2")
    for number in range(60):
        run = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", run)
        file = files[number % len(files)]
        position = int(rng.integers(8 * file.stat().st_size))
        flip_a_bit(run / "checkpoints" / file.relative_to(directory), position)
        restored, notes = restore_and_notes(run, small_tree())
        assert restored.step == 1 and len(notes) == 1, (file, position)
        shutil.rmtree(run)


def test_a_checkpoint_under_another_label_is_set_aside(tmp_path):
    directory = save_all(tmp_path, [1, 2])
    (directory / "2").rename(directory / "500")
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 1 and "called 500 and holds step 2" in notes[0]


def test_one_without_digests_is_used_only_when_nothing_else_exists(tmp_path):
    directory = save_all(tmp_path / "run", [1, 2])
    for file in directory.glob("2/_*"):
        if "DIGESTS" in file.name:
            file.unlink()
    assert committed_steps(directory) == [1]
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    restored, notes = restore_and_notes(tmp_path / "run", small_tree())
    assert restored.step == 1 and "2 is deleted (it was not committed)" in notes[0]
    shutil.rmtree(tmp_path / "alone/checkpoints/1")
    restored, notes = restore_and_notes(tmp_path / "alone", small_tree())
    assert restored.step == 2 and equal(restored.state, small_tree(2))
    assert "2 has no digests" in notes[0] and "no other" in notes[0]
    # From now on it is protected like any other.
    assert committed_steps(tmp_path / "alone/checkpoints") == [2]


def test_what_no_loss_has_verified_displaces_nothing(tmp_path):
    options = {"keep_newest": 2, "keep_best": 0}
    directory = save_all(tmp_path, [1, 2], **options)
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step in range(3, 7):
            checkpoints.save(step, small_tree(step), {}, held_out_loss=float("nan"))
        checkpoints.save(7, small_tree(7), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 6, 7]  # 7 may turn out well, 6 is the newest doubt
        checkpoints.verify(7, finite=False)
    assert committed_steps(directory) == [1, 2, 7]
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 2 and "7 is deleted (the loss was not finite" in notes[0]


def test_a_doubtful_one_that_turns_out_well_counts_again(tmp_path):
    options = {"keep_newest": 1, "keep_best": 0}
    directory = save_all(tmp_path, [1], **options)
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.save(2, small_tree(2), {})
        checkpoints.verify(2, finite=False)
        checkpoints.verify(2, finite=True)
    assert committed_steps(directory) == [2]


def test_the_newest_is_used_where_no_doubt_was_recorded(tmp_path):
    directory = save_all(tmp_path, [1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, small_tree(2), {})
    assert retention.verdicts(directory) == {1: True, 2: None}
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 2 and not notes


def test_a_doubt_concerns_all_that_nothing_has_verified(tmp_path):
    options = {"keep_newest": 1, "keep_best": 0}
    directory = save_all(tmp_path, [1], **options)
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, small_tree(step), {})
        checkpoints.wait()
        checkpoints.verify(3, finite=False)
        checkpoints.save(4, small_tree(4), {}, held_out_loss=1.0, doubtful=True)
    # The newest doubtful one stays beside the verified one, and does not rank.
    assert retention.verdicts(directory) == {1: True, 4: False}
    assert select_step(tmp_path, 1) == 1
    with pytest.warns(match="checkpoint 1 is taken, the last before .* and not 4"):
        assert select_step(tmp_path, None) == 1
    with pytest.warns(match="checkpoint 4: the loss was not finite with it"):
        assert select_step(tmp_path, 4) == 4
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 1 and "4 is deleted (the loss was not finite" in notes[0]


@pytest.mark.parametrize("late", [False, True])
def test_a_doubtful_checkpoint_is_marked_before_it_counts(tmp_path, monkeypatch, late):
    verified, usual = threading.Event(), ocp.save_checkpointables_async

    class Slow:
        def __init__(self, *arguments, **options):
            self.response = usual(*arguments, **options)

        def result(self):
            assert verified.wait(30)
            self.response.result()

    def killed(path, *rest):
        assert retention.verdict(path) is False
        raise OSError("killed")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(digests, "seal", killed)
        monkeypatch.setattr(ocp, "save_checkpointables_async", Slow)
        checkpoints.save(1, small_tree(1), {}, doubtful=not late)
        if late:
            checkpoints.verify(1, finite=False)
        verified.set()
        with pytest.raises(CheckpointError, match="killed"):
            checkpoints.wait()


def test_the_best_one_is_none_with_which_the_loss_was_not_finite(tmp_path):
    directory = save_all(tmp_path, [1, 2, 3], losses={1: 3.0, 2: 2.0, 3: 1.0}, keep_best=3)
    retention.mark(directory / "3", False)
    assert select_step(tmp_path, "best") == 2
    for step in (1, 2):
        shutil.rmtree(directory / str(step))
    with pytest.warns(match="checkpoint 3: the loss was not finite"):
        assert select_step(tmp_path, "best") == 3


def test_one_without_digests_is_meant_only_by_its_number(tmp_path):
    directory = save_all(tmp_path, [1, 2], losses={1: 2.0, 2: 1.0})
    for file in directory.glob("2/_DIGESTS*"):
        file.rename(file.with_name("_DIGESTS-0-of-2.json"))  # the second process was killed
    assert select_step(tmp_path, None) == select_step(tmp_path, "best") == 1
    assert select_step(tmp_path, 2) == 2
    with pytest.warns(match="2 has no digests"):
        read_leaves(tmp_path, 2, {"w": np.empty((8, 4), np.float32)})


def test_what_cannot_be_deleted_is_no_failed_save(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(retention, "delete", fail)
    notes = []
    with Checkpoints(tmp_path, keep_newest=1, keep_best=0, message=notes.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, small_tree(step), {})
            checkpoints.verify(step, finite=True)
    assert committed_steps(tmp_path / "checkpoints") == [1, 2, 3]
    assert "checkpoint 1 could not be deleted" in notes[0] and "Permission denied" in notes[0]


def test_a_doubt_that_cannot_be_noted_is_said(tmp_path, monkeypatch):
    def fail(path, finite):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(retention, "mark", fail)
    notes = []
    with Checkpoints(tmp_path, message=notes.append) as checkpoints:
        checkpoints.save(1, small_tree(1), {})
        checkpoints.wait()
        checkpoints.verify(1, finite=False)
    assert "checkpoint 1 could not be marked doubtful" in notes[0] and "No space" in notes[0]


def test_a_mistake_of_ours_in_the_background_is_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "mark", lambda path, finite: 1 / 0)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small_tree(1), {})
        checkpoints.wait()
        checkpoints.verify(1, finite=False)


def test_a_doubtful_one_is_better_than_none(tmp_path):
    save_all(tmp_path, [1], losses={1: float("nan")})
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 1 and "not finite" in notes[0]


def test_a_deletion_that_was_interrupted_is_completed_silently(tmp_path):
    directory = save_all(tmp_path, [1, 2])
    (directory / "1").rename(directory / "1.deleting")
    files_of(directory / "1.deleting")[0].unlink()
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 2 and not notes
    assert [path.name for path in directory.iterdir()] == ["2"]


def test_killed_while_a_checkpoint_is_deleted(tmp_path, monkeypatch):
    """Whatever of it was removed, it no longer bears a label."""
    directory = save_all(tmp_path, [1])

    def killed(path, **options):
        if path.exists():
            files_of(path)[0].unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.delete(directory / "1")
    assert retention.labels(directory) == []


def test_descriptors_and_threads_do_not_grow(tmp_path):
    def used():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 41):
            checkpoints.save(step, {"w": jnp.zeros(3)}, {})
            checkpoints.verify(step, finite=True)
            if step == 20:
                checkpoints.wait()
                before = used()
        checkpoints.wait()
        after = used()
    # A pool of threads may still fill up; one descriptor or thread a save would be 20.
    assert after[0] <= before[0] + 4 and after[1] <= before[1] + 8, (before, after)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_damage_found_only_while_reading_also_falls_back(tmp_path):
    # Neither has digests: only reading can tell.
    directory = save_all(tmp_path, [1, 2])
    for file in directory.glob("*/_DIGESTS*"):
        file.unlink()
    (directory / "2/state/manifest.ocdbt").write_bytes(b"")
    restored, notes = restore_and_notes(tmp_path, small_tree())
    assert restored.step == 1
    assert "checkpoint 2 is damaged" in notes[0]
    assert (tmp_path / "checkpoints/damaged").is_dir()


def test_nothing_left_to_restore(tmp_path):
    directory = save_all(tmp_path, [1])
    files_of(directory / "1")[0].unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert not checkpoints.are_all_damaged()
        with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
            checkpoints.restore(abstract(small_tree()))
        assert checkpoints.are_all_damaged()


def test_a_full_disk_is_a_clear_error_and_harms_no_earlier_checkpoint(tmp_path):
    # A limit on file size makes writes fail in the same place as a full disk, without root.
    big = jax.random.normal(jax.random.key(0), (300, 300))
    more = big + 1  # before the limit, which also stops the cache of compiled programs
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": big}, {})
        checkpoints.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            with pytest.raises(CheckpointError, match="2 could not be written.*1 is intact"):
                checkpoints.save(2, {"w": more}, {})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract({"w": big}))
        assert restored.step == 1 and equal(restored.state, {"w": big})
        checkpoints.save(2, {"w": more}, {})  # with space again, the same label works
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_data_and_leaves_are_plain_json(tmp_path):
    directory = save_all(tmp_path, [4])
    assert json.loads((directory / "4/data/data.json").read_text()) == {"step": 4}
    assert ["w", [8, 4], "float32"] in json.loads((directory / "4/leaves/data.json").read_text())


def test_restoring_on_8_4_1_and_8_devices_is_bitwise(tmp_path):
    """The state moves over the meshes bitwise; one more step agrees up to reduction order."""
    batches = [stand_in.batch_at(i) for i in range(3)]
    configs = [MeshConfig(2, 4), MeshConfig(1, 4), MeshConfig(1), MeshConfig(2, 4)]
    steps, states, meshes = [], [], []
    for number, config in enumerate(configs):
        mesh = make_mesh(config)
        step = make_step(
            stand_in.init_params, stand_in.loss_fn, optax.adamw(1e-2), mesh=mesh,
            param_specs=stand_in.SPECS,
        )  # fmt: skip
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            if number == 0:
                state = step.init(jax.random.key(0))
                for batch in batches[:2]:
                    state, _ = step.update(state, to_global(mesh, batch, 32))
            else:
                with Checkpoints(tmp_path / str(number - 1)) as previous:
                    state = previous.restore(step.abstract_state).state
                assert jax.tree.all(
                    jax.tree.map(lambda x, s: x.sharding == s, state, step.shardings)
                )
            checkpoints.save(2, state, {})
        steps.append(step)
        states.append(state)
        meshes.append(mesh)
    assert all(equal(states[0], state) for state in states[1:])
    losses = []
    for step, state, mesh in zip(steps, states, meshes, strict=True):
        state, metrics = step.update(state, to_global(mesh, batches[2], 32))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
