"""Runs of the embedded pair, for all tests: in this process, in a forked child, and as the words of a command.

A forked child need not import torch again, which takes seconds.
"""

import json
import os
import sys
import traceback
from statistics import fmean

import torch
from helpers import evaluation_figures

from opd import train as training
from opd.config import load_config
from opd.errors import InputError, Interrupted
from tip.config import SECTIONS
from tip.diagnostics import TipObserver
from tip.weighter import TipWeighter

CONFIG = "configs/tiny.json"


def words(*settings):
    """Arguments of a command on the embedded pair with these settings."""
    return ["--config", CONFIG, *(word for setting in settings for word in ("--set", str(setting)))]


def configured(out, *settings):
    """The pair's configuration with these settings, and its extension sections; the run lies in `out`/run."""
    return load_config(CONFIG, [f"output_dir={out}", "run_name=run", *settings], SECTIONS)


def train(out, *settings, resume="auto", shared=None, plain=False):
    """Trains in this process, with selection by the settings in `tip.`, or plainly; returns the run's folder."""
    config, sections = configured(out, *settings)
    if plain:
        return training.run(config, resume=resume, shared=shared)
    weighter = TipWeighter(sections["tip"])
    return training.run(config, weighter, sections, resume, TipObserver(weighter), shared)


def forked(work, log=None):
    """Does the work in a forked child; returns its process id. What the child says goes to the file `log`, if any.

    Its exit code is that of a command: 0, 2 for wrong input, 128 + signal for a run that was stopped, else 1.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            if log is not None:
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1), os.dup2(handle, 2)
                sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except Interrupted as stop:
            code = 128 + stop.signum
        except InputError as error:
            print(f"error: {error}", flush=True)
            code = 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def status(child):
    """The exit code of a forked child, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupted_before(update, monkeypatch):
    """A run of this process ends like a killed one when it comes to that update; undone with the monkeypatch."""
    original = training.update

    def interrupted(run):
        if run.step + 1 == update:
            raise KeyboardInterrupt
        original(run)

    monkeypatch.setattr(training, "update", interrupted)


def write_finished(run, seed, evaluations):
    """Writes the folder of a finished run that has not run: update -> the sampled responses of benchmark `tiny`."""
    for step, rows in evaluations.items():
        folder = run / "eval" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        accuracy = fmean(row["correct"] for row in rows)
        figures = evaluation_figures(
            problems=len({row["id"] for row in rows}), k=1, mean_at_k=accuracy, mean_at_k_se=0.1
        )
        (folder / "summary.json").write_text(json.dumps({"tiny": figures}))
    seconds = dict.fromkeys(("step", "rollout", "teacher", "score", "update"), 1.0)
    summary = {"steps": max(evaluations), "eval": {key: {} for key in ("step_0", "teacher", "final")}}
    summary |= {"tokens": {"kept": 1, "response": 2}, "seconds": seconds}
    (run / "summary.json").write_text(json.dumps(summary | {"seconds_evaluating": 0.0, "peak_memory_gb": 1.0}))
    (run / "metrics.jsonl").write_text("")
    recorded = {name: {} for name in ("student", "teacher", "data")} | {"seed": seed, "run_name": "run"}
    (run / "config.json").write_text(json.dumps({"config": recorded, "versions": {}, "git_commit": None}))
