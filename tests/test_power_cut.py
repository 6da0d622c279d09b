"""What is on the disk when the power fails: a disk that keeps what was flushed to it, and nothing else.

A file keeps the bytes it had when it was last flushed (none if it never was), a folder the names that it had. So a
rename whose folder was not flushed afterwards never happened, and a file that was renamed before it was flushed is
empty.
"""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from helpers import engine_for, one_each, pair_of, random_lm, random_rollouts

from opd.config import load_config
from opd.files import write_whole
from opd.record import checkpoint
from opd.step import train_step
from opd.train import run
from tip.config import TipConfig
from tip.weighter import TipWeighter

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads flushed files through /proc")


class Disk:
    """Everything below `root` is on it; from then on only what is flushed.

    Files and folders are known by inode, so it does not matter which function renames them or by which path they are
    flushed. Whatever is recorded is held open, so that no inode is given to another file.
    """

    def __init__(self, root, monkeypatch):
        self.root, self.content, self.names, self.held = root, {}, {}, []
        for path in (root, *root.rglob("*")):
            handle = os.open(path, os.O_RDONLY)
            self.record(handle)
            os.close(handle)
        self.watchers = []
        for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree")):
            monkeypatch.setattr(owner, name, self.watched(getattr(owner, name), name == "fsync"))

    def watched(self, original, flushes):
        def call(first, *rest, **named):
            for watcher in self.watchers:
                watcher()  # the power may fail right before
            answer = original(first, *rest, **named)
            if flushes:
                self.record(first)
            return answer

        return call

    def record(self, handle):
        own = os.fstat(handle)
        self.held.append(os.dup(handle))
        if stat.S_ISDIR(own.st_mode):
            self.names[own.st_ino] = found = {}
            for name in os.listdir(handle):
                self.held.append(os.open(name, os.O_RDONLY, dir_fd=handle))
                child = os.fstat(self.held[-1])
                found[name] = (child.st_ino, stat.S_ISDIR(child.st_mode))
        else:
            self.content[own.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

    def after_a_power_cut(self, target, names="flushed"):
        """Writes what is left to `target`. With `names` "all" the disk had all renames and new files already, and not
        what is in them, since it may write in any order: a file that was changed after it was flushed is empty."""
        root = self.root.stat().st_ino, True
        shutil.rmtree(target, ignore_errors=True)
        self._write(root, target, self.root if names == "all" else None)
        return target

    def _write(self, node, target, now):
        inode, is_folder = node
        if not is_folder:
            flushed = self.content.get(inode, b"")
            target.write_bytes(b"" if now is not None and now.read_bytes() != flushed else flushed)
            return
        target.mkdir(parents=True)
        children = self.names.get(inode, {})
        if now is not None:
            children = {p.name: (p.stat().st_ino, p.is_dir()) for p in now.iterdir()}
        for name, child in children.items():
            self._write(child, target / name, None if now is None else now / name)

    def close(self):
        for handle in self.held:
            os.close(handle)


@pytest.fixture
def disk_of(monkeypatch):
    disks = []

    def make(root):
        disks.append(Disk(root, monkeypatch))
        return disks[-1]

    yield make
    monkeypatch.undo()
    for disk in disks:
        disk.close()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_disk_of_these_tests_forgets(disk_of, tmp_path):
    root, after = tmp_path / "root", tmp_path / "after"
    root.mkdir()
    (root / "old").write_text("old")
    disk = disk_of(root)
    with (root / "new").open("w") as file:
        file.write("new")
        file.flush()
        assert contents(disk.after_a_power_cut(after)) == {"old": b"old"}
        assert contents(disk.after_a_power_cut(after, "all")) == {"old": b"old", "new": b""}
        os.fsync(file.fileno())
        assert contents(disk.after_a_power_cut(after)) == {"old": b"old"}
        assert contents(disk.after_a_power_cut(after, "all")) == {"old": b"old", "new": b"new"}
        file.write(", and more")
    assert contents(disk.after_a_power_cut(after, "all")) == {"old": b"old", "new": b""}
    os.replace(root / "new", root / "old")
    assert contents(disk.after_a_power_cut(after)) == {"old": b"old"}
    handle = os.open(root, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    assert contents(disk.after_a_power_cut(after)) == {"old": b"new"}


@pytest.fixture(scope="module")
def trained():
    """A model after one update, its engine, and what a weighter may remember."""
    lm = random_lm(3)
    engine = engine_for(lm)
    train_step(
        pair_of(lm, random_lm(4, name="teacher")),
        engine,
        one_each(random_rollouts(lm)),
        TipWeighter(TipConfig()),
        step=1,
        seed=0,
    )
    return lm, engine, {"weighter": {"reverse_kl": torch.arange(5.0)}}


def test_a_checkpoint_is_on_the_disk_when_save_returns(trained, disk_of, tmp_path):
    """And removing the one before loses nothing: the new one is there whatever the disk did not write yet."""
    folder = tmp_path / "run"
    checkpoint.save(folder, 1, *trained, keep=1)
    disk = disk_of(folder / "checkpoints")
    saved = checkpoint.save(folder, 2, *trained, keep=1)
    for names in ("flushed", "all"):
        left = tmp_path / names
        disk.after_a_power_cut(left / "checkpoints", names)
        found = checkpoint.newest(left)
        assert found is not None and found.name == "step_000002" and checkpoint.verify(found) == 2
        assert contents(found) == contents(saved)
        assert {
            "model.safetensors",
            "manifest.json",
            "trainer.json",
            "trainer/optimizer.safetensors",
            "trainer/weighter.safetensors",
        } <= set(contents(found))


def test_the_power_may_fail_at_any_moment_of_a_save(trained, disk_of, tmp_path):
    folder, moments = tmp_path / "run", []
    checkpoint.save(folder, 1, *trained, keep=1)
    disk = disk_of(folder / "checkpoints")

    def look():
        disk.watchers.clear()  # what follows renames and removes files of its own
        for names in ("flushed", "all"):
            left = tmp_path / names
            disk.after_a_power_cut(left / "checkpoints", names)
            found = checkpoint.newest(left)
            moments.append((names, found and checkpoint.verify(found)))
        disk.watchers.append(look)

    disk.watchers.append(look)
    checkpoint.save(folder, 2, *trained, keep=1)
    assert len(moments) > 20  # every file, three folders, two renames, one removal
    assert {step for _, step in moments} == {1, 2}, moments


def test_a_file_that_is_written_whole_is_never_empty(disk_of, tmp_path):
    root, found = tmp_path / "root", []
    root.mkdir()
    (root / "latest").write_text("old\n")
    disk = disk_of(root)

    def look():
        disk.watchers.clear()
        found.extend(contents(disk.after_a_power_cut(tmp_path / "left", n))["latest"] for n in ("flushed", "all"))
        disk.watchers.append(look)

    disk.watchers.append(look)
    write_whole(root / "latest", "new\n")
    look()
    assert len(found) >= 6 and set(found) == {b"old\n", b"new\n"} and found[-1] == b"new\n"


def test_no_checkpoint_without_the_metrics_that_lead_to_it(tiny_pair, disk_of, tmp_path, monkeypatch):
    """Whenever a checkpoint gets its name, metrics.jsonl up to its update has been flushed."""
    config, _ = load_config(
        "configs/tiny.json",
        [
            f"output_dir={tmp_path}",
            "run_name=run",
            "optim.steps=2",
            "optim.warmup_steps=0",
            "eval.benchmarks=[]",
            "checkpoint.every=1",
            "rollout.prompts_per_step=4",
            "log.diagnostics_every=0",
            "log.samples=0",
        ],
    )
    folder, seen = tmp_path / "run", {}
    disk = disk_of(tmp_path)

    def look():
        published = sorted((folder / "checkpoints").glob("step_*"))
        if published and published[-1].name not in seen:
            flushed = disk.content.get((folder / "metrics.jsonl").stat().st_ino, b"").decode()
            seen[published[-1].name] = [json.loads(line)["step"] for line in flushed.splitlines()]

    disk.watchers.append(look)
    run(config)
    assert seen == {f"step_{n:06d}": list(range(1, n + 1)) for n in (1, 2)}
