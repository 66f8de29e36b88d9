import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tinyllm.train.checkpoint import list_checkpoints, load_checkpoint, prune, save_checkpoint, step_of


def save(folder, step, value=None, size=100):
    value = step if value is None else value
    model = {"w": np.full(size, value, np.float32), "b": np.arange(3)}
    return save_checkpoint(folder, step, model, {"m": np.full(size, -value, np.float64)}, {"value": value, "loss": 0.1 + 0.2})


def assert_sound(path):
    loaded = load_checkpoint(path)
    assert loaded.step == step_of(path)
    value = loaded.state["value"]
    assert (loaded.model["w"] == value).all() and (loaded.optimizer["m"] == -value).all()
    return value


def names(folder):
    return sorted(os.listdir(folder))


def test_round_trip(tmp_path):
    state = {"position": 3, "scale": 65536.0, "tiny": 5e-324, "best": None, "nan": float("nan"), "text": "é\n", "nested": [1, {"a": []}]}
    weights = {"w": np.array([[0.1, np.nan]], np.float32), "scalar": np.array(2.0)}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", 200, weights, {}, state)
    assert path == tmp_path / "new" / "checkpoints" / "step-000200"
    assert names(path) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step, loaded.optimizer) == (path, 200, {})
    assert all(loaded.model[name].tobytes() == array.tobytes() for name, array in weights.items())
    assert repr(loaded.state) == repr(state)


def test_checkpoints_are_listed_by_step_without_leftovers(tmp_path):
    assert list_checkpoints(tmp_path / "nothing") == []
    for step in (10, 2_000_000, 9, 999_999):
        save(tmp_path, step)
    (tmp_path / "step-000011.tmp").mkdir()
    (tmp_path / "step-best").mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [9, 10, 999_999, 2_000_000]
    save(tmp_path, 12)
    assert not (tmp_path / "step-000011.tmp").exists() and (tmp_path / "step-best").exists()
    with pytest.raises(ValueError, match="expected a folder named like step-000200"):
        step_of(tmp_path / "step-best")


def test_prune_keeps_the_newest_and_the_protected(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step)
    prune(tmp_path, keep=2, protect={3})
    assert names(tmp_path) == ["step-000003", "step-000005", "step-000006"]
    prune(tmp_path, keep=9)
    assert len(names(tmp_path)) == 3
    with pytest.raises(ValueError, match="at least 1 checkpoint, found 0"):
        prune(tmp_path, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 7, value=1)
    held = load_checkpoint(save(tmp_path, 7, value=2))
    save(tmp_path, 7, value=3)
    assert assert_sound(tmp_path / "step-000007") == 3 and names(tmp_path) == ["step-000007"]
    if os.name == "posix":
        assert (held.model["w"] == 2).all()  # arrays in use stay what they were


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_killed_while_replacing(tmp_path, monkeypatch, renames):
    """At each of the renames of a replacement one of the two versions is listed, and the next save clears up."""
    save(tmp_path, 7, value=1)
    done = []
    rename = os.rename

    class Killed(BaseException):
        pass

    def killed(source, target):
        if len(done) == renames:
            raise Killed
        done.append(rename(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process clears nothing up
        try:
            save(tmp_path, 7, value=2)
        except Killed:
            pass
    (listed,) = list_checkpoints(tmp_path)
    value = assert_sound(listed)
    assert value == (1 if renames < 2 else 2)
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-000007", "step-000008"] and assert_sound(tmp_path / "step-000007") == value


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_damage_is_named_and_an_intact_checkpoint_offered(tmp_path, name, damage):
    for step in (1, 2, 3):
        save(tmp_path, step)
    file = tmp_path / "step-000003" / name
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    file.unlink()
    if damage != "delete":
        file.write_bytes({"truncate": data[:middle], "flip": flipped, "empty": b""}[damage])
    (tmp_path / "step-000002" / "state.json").write_text("[]")
    with pytest.raises(ValueError) as caught:
        load_checkpoint(tmp_path / "step-000003")
    message = str(caught.value)
    assert message.startswith(f"{file} is {'missing' if damage == 'delete' else 'damaged'}") and "\n" not in message
    assert message.endswith(f"; {tmp_path / 'step-000001'} is intact, use that")


def test_damage_without_another_checkpoint_and_missing_checkpoint(tmp_path):
    (save(tmp_path, 1) / "state.json").write_text('{"checksum": 3}')
    with pytest.raises(ValueError, match="damaged: its checksum does not match; no other checkpoint beside it is intact"):
        load_checkpoint(tmp_path / "step-000001")
    with pytest.raises(FileNotFoundError, match="step-000002: no such checkpoint"):
        load_checkpoint(tmp_path / "step-000002")


def test_every_byte_of_the_state_is_covered(tmp_path):
    path = save(tmp_path, 1)
    sound = (path / "state.json").read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1
        (path / "state.json").write_bytes(damaged)
        try:
            assert repr(load_checkpoint(path).state) == repr({"value": 1, "loss": 0.1 + 0.2})  # only white space was hit
        except ValueError as error:
            assert "state.json is damaged" in str(error)


@pytest.mark.parametrize("state, model", [({"a": object()}, {}), ({("a", "b"): 1}, {}), ({}, {"w": np.array([None])})])
def test_what_cannot_be_stored_leaves_nothing_behind(tmp_path, state, model):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="what JSON can hold|is object, expected"):
        save_checkpoint(tmp_path, 2, model, {}, state)
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("call", range(8))
def test_full_disk_at_any_moment_keeps_what_was_there(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    save(tmp_path, 2, value=5)
    count = 0
    fsync = os.fsync

    def full(handle):
        nonlocal count
        count += 1
        if count > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        try:
            save(tmp_path, 2, value=6)
        except OSError as error:
            assert error.errno == errno.ENOSPC and "\n" not in str(error)
            assert f"cannot save the checkpoint {tmp_path / 'step-000002'}: No space left on device; earlier" in str(error)
    assert assert_sound(tmp_path / "step-000001") == 1
    assert [assert_sound(path) for path in list_checkpoints(tmp_path)] in ([1, 5], [1, 6])
    assert not any(name.endswith(".tmp") for name in names(tmp_path))
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_really_full_disk(tmp_path):
    """A process that may write no file above 64 KB stands for a disk that fills up in the middle of a file."""
    script = f"""
import resource
from test_checkpoint_files import save
save({str(tmp_path)!r}, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
save({str(tmp_path)!r}, 2, size=1_000_000)
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("OSError: [Errno 27] cannot save the checkpoint ")
    assert names(tmp_path) == ["step-000001"] and assert_sound(tmp_path / "step-000001") == 1


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_at_random_moments_every_visible_checkpoint_loads(tmp_path):
    script = f"""
from test_checkpoint_files import save
from tinyllm.train.checkpoint import prune
for value in range(10**6):
    save({str(tmp_path)!r}, value % 5, value, size=50_000)
    prune({str(tmp_path)!r}, keep=3)
    print(value, flush=True)
"""
    chance = random.Random(0)
    seen = 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", script], env=environment(), stdout=subprocess.PIPE) as saver:
            while saver.stdout.readline() != b"4\n":  # by then it replaces earlier checkpoints
                assert saver.poll() is None
            time.sleep(chance.uniform(0, 0.05))
            saver.send_signal(signal.SIGKILL)
        found = [assert_sound(path) for path in list_checkpoints(tmp_path)]
        assert found
        seen += len(found)
    assert seen >= 16
    save(tmp_path, 9)
    assert not any(name.endswith((".tmp", ".replaced")) for name in names(tmp_path))


def environment():
    here = os.path.dirname(os.path.abspath(__file__))
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
