"""The console: what is said and shown while work goes on, and the time that is left."""

import io
import json
import logging
import re
import subprocess
import sys
import threading

import pytest
import runs

from opd.console import Console, quiet_libraries
from opd.progress import Progress, RunProgress
from tip import train as tip_train
from tip.jobs import AllJobs, Job, Running


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Work:
    """A row whose state is what the test writes into it."""

    def __init__(self, label, state, share=None):
        self.label, self.words, self.done = label, state, share

    def fraction(self):
        return self.done

    def state(self):
        return self.words


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def console(clock):
    return Console(clock, look_every=1e6)  # its thread sleeps, and the tests look themselves


def test_a_line_tells_all_open_rows_before_ten_silent_seconds_are_over(console, clock, capsys):
    def said_after(seconds):
        clock.now += seconds
        console.look()
        return capsys.readouterr().err

    with console.show(Work("run", "update 3/60")):
        with console.show(Work("rollouts", "20/32")):
            assert said_after(9) == ""
            assert said_after(0.9) == "run: update 3/60; rollouts: 20/32\n"
            assert said_after(9) == ""
            console.say("a message")
            assert said_after(9) == "a message\n"
            assert said_after(0.9) == "run: update 3/60; rollouts: 20/32\n"
        assert said_after(9.9) == "run: update 3/60\n"
    assert said_after(100) == ""


def test_the_silence_before_the_first_row_counts(console, clock, capsys):
    clock.now += 10
    with console.show(Work("run", "loading")):
        console.look()
    assert capsys.readouterr().err == "run: loading\n"


def test_a_thread_looks_while_the_work_itself_does_nothing(clock, capsys):
    told = threading.Event()

    class Observed(Work):
        def state(self):
            told.set()
            return super().state()

    console = Console(clock, look_every=0.001)
    with console.show(Observed("run", "stuck")):
        clock.now += 10
        assert told.wait(60)
    assert console.thread is not None and not console.thread.is_alive()
    assert capsys.readouterr().err == "run: stuck\n"


def test_a_row_closes_with_its_work_also_when_that_fails(console, clock, capsys):
    with pytest.raises(OSError), console.show(Work("run", "going on")):
        raise OSError
    clock.now += 100
    console.look()
    assert not console.rows and capsys.readouterr().err == ""


def test_of_several_processes_the_first_alone_speaks(console, clock, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with console.show(Work("run", "going on")):
        clock.now += 100
        console.look()
        console.tell()
        console.say("hello")
    assert capsys.readouterr().err == "" and console.thread is None


def test_on_a_terminal_the_rows_are_bars_below_the_messages(console, clock, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")

    def new():
        console.look()
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
        screen.seek(0), screen.truncate()
        return text

    with console.show(Work("[run]", "update 3/60, [bold]", share=0.05)):
        assert "[run]" in (text := new()) and "update 3/60, [bold]" in text
        with console.show(Work("rollouts", "20/32")):
            assert "rollouts" not in new()  # short work would only flicker
            clock.now += 2
            assert "rollouts" in (text := new()) and "20/32" in text
            console.say("a message")
            console.tell()  # bars say it already
            assert new().index("a message\n") >= 0
        clock.now += 100
        assert "rollouts" not in (text := new()) and "[run]: " not in text
    assert sys.stderr is screen and screen.getvalue().endswith("\x1b[2K\x1b[?25h\r")  # no bar is left


def test_a_terminal_that_can_draw_nothing_gets_lines(console, clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with console.show(Work("run", "going on")):
        clock.now += 10
        console.look()
    assert screen.getvalue() == "run: going on\n"


def test_the_console_comes_without_large_libraries():
    program = "import opd.console, sys; print({'rich', 'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_counted_work_tells_its_rate_and_what_is_left(clock):
    progress = Progress("student on math500", 10, clock=clock)
    assert progress.state() == "0/10 responses" and progress.fraction() == 0
    clock.now += 20
    progress.advance(0, 100)
    assert progress.state() == "0/10 responses, 100 tokens, 5 tokens/s"
    progress.advance(2, 0)
    assert progress.state() == "2/10 responses, 100 tokens, 5 tokens/s, 0:01:20 left" and progress.fraction() == 0.2
    clock.now += 30
    assert progress.state().endswith("0:00:50 left")  # it goes down while the next one is in work
    assert Progress("loading", clock=clock).state() == "for 0:00:00"


def test_what_is_left_of_a_run_counts_updates_checkpoints_and_evaluations(clock, monkeypatch):
    monkeypatch.setattr("opd.progress.CONSOLE", Console(clock))
    run = RunProgress("run", 4, [0, 2, 4], clock)

    def evaluated(who, seconds):
        run.evaluates(who)
        assert f"evaluating the {who}" in run.state()
        clock.now += seconds
        run.evaluated(seconds, who == "teacher")

    evaluated("teacher", 100)
    evaluated("step-0 student", 50)
    assert run.left() is None and run.fraction() is None and run.state() == "update 0/4"  # no update was timed
    clock.now += 10
    run.updated(1, "loss 0.5")
    assert run.left() == 3 * 10 + 2 * 50 and run.state() == "update 1/4, 0:02:10 left, loss 0.5"
    assert run.fraction() == pytest.approx(160 / 290)  # the teacher's evaluation is work that is done
    clock.now += 4
    assert run.left() == 126
    clock.now += 96  # the update takes long, and takes nothing from what comes after it
    assert run.left() == 2 * 10 + 2 * 50
    clock.now -= 80
    run.updated(2, "")  # it took 20 seconds, a checkpoint included
    assert run.left() == 2 * 15 + 2 * 50
    evaluated("student after update 2", 70)
    assert run.left() == 2 * 15 + 70
    for step in (3, 4):
        clock.now += 15
        run.updated(step, "")
    assert run.left() == 70
    evaluated("student after update 4", 70)
    assert run.left() == 0 and run.fraction() == 1


def test_a_run_that_continues_knows_its_first_evaluation(clock):
    run = RunProgress("run", 4, [0, 2, 4], clock)
    run.continue_after(3, per_evaluation=50.0)
    assert run.state() == "update 3/4" and run.left() is None
    run.continue_after(4, per_evaluation=50.0)
    assert run.left() == 50  # the evaluation after the last update was stopped


def test_every_tenth_update_has_a_line(clock, monkeypatch, capsys):
    console = Console(clock, look_every=1e6)
    monkeypatch.setattr("opd.progress.CONSOLE", console)
    run = RunProgress("run", 24, [], clock)
    with console.show(run):
        for step in range(1, 25):
            clock.now += 1
            run.updated(step, f"loss {step}")
    assert capsys.readouterr().err.splitlines() == [
        "run: update 10/24, 0:00:14 left, loss 10",
        "run: update 20/24, 0:00:04 left, loss 20",
        "run: update 24/24, 0:00:00 left, loss 24",
    ]


def messages(capsys):
    """What was said, without the lines that break a long silence on a slow machine."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run: loading")]


def test_a_run_says_its_settings_its_evaluations_and_its_end(tiny_pair, tmp_path, capsys):
    settings = ("optim.steps=2", "optim.warmup_steps=0", "eval.k=1", "eval.limit=4", "eval.every=0")
    runs.train(tmp_path, *settings, "tip.rule=q3", "tip.retention=0.25")
    said = messages(capsys)
    assert said[:6] == [
        "student  data/tiny/pairs/chain/student",
        "teacher  data/tiny/pairs/chain/teacher",
        "tokens   q3, retention 0.25",
        "updates  2 of 32 rollouts, learning rate 0.0003",
        "engine   torch on cpu, rollouts by transformers",
        f"folder   {tmp_path}/run",
    ]
    beginnings = ("teacher: tiny greedy", "step-0 student: tiny greedy", "update 2/2, 0:00:0")
    beginnings += ("student after update 2: tiny greedy", "done; 2 updates took 0:00:0")
    told = [line for line in said[6:] if re.match("run: (teacher|step-0|student|done|update 2)", line)]
    assert len(told) == 5 and all(line.startswith(f"run: {b}") for line, b in zip(told, beginnings, strict=True))
    update = r"loss 0\.\d{4}, kept 2\d\.\d% of \d+ tokens, right \d+%, gradient [\d.]+, [\d.]+ s$"
    assert re.search(update, told[2]) and not any("{" in line for line in said)


def test_runs_that_share_evaluations_introduce_themselves_in_one_line(tiny_pair, tmp_path, capsys):
    runs.train(tmp_path, "optim.steps=1", "optim.warmup_steps=0", "eval.benchmarks=[]", shared=tmp_path, plain=True)
    first = messages(capsys)[0]
    assert first == (
        "run: all; updates: 1 of 32 rollouts, learning rate 0.0003; torch on cpu, rollouts by transformers; "
        f"{tmp_path}/run"
    )


def test_verbose_prints_the_resolved_configuration(tiny_pair, tmp_path, capsys):
    settings = (f"output_dir={tmp_path}", "optim.steps=1", "optim.warmup_steps=0", "eval.benchmarks=[]")
    tip_train.command([*runs.words(*settings), "--verbose"])
    captured = capsys.readouterr()
    printed = json.loads(captured.err[: captured.err.index("\n}") + 2])
    assert printed == json.loads((tmp_path / "tiny" / "config.json").read_text())["config"]
    assert captured.out == f"{tmp_path / 'tiny'}\n"


def test_messages_of_libraries_that_help_nobody_are_silenced_by_name():
    quiet_libraries()
    assert not logging.getLogger("matplotlib.font_manager").isEnabledFor(logging.WARNING)
    assert logging.getLogger("matplotlib").isEnabledFor(logging.WARNING)
    assert logging.getLogger("transformers").isEnabledFor(logging.WARNING)


# --- several processes ------------------------------------------------------------------------------------------------


def part_at_work(folder, clock, text, before="", arm="soft_or 0.5"):
    """A part whose process has written `text` into its log, which held something before."""
    log = Job(3, arm).log(folder)
    log.write_text(before + text)
    return Running(Job(3, arm), None, None, log, len(before), clock.now)


def test_the_state_of_a_part_is_the_last_line_of_its_own_process(tmp_path, clock):
    earlier = "soft_or-0.5: update 60/60, 0:00:01 left\n"
    part = part_at_work(tmp_path, clock, "", earlier)
    assert (part.label, part.state(), part.fraction()) == ("seed 3: soft_or 0.5", "starting", None)
    line = "soft_or-0.5: update 20/60, 0:00:09 left, loss 0.1234, kept 50%"
    part = part_at_work(tmp_path, clock, f"{line}\n", earlier)
    assert (part.state(), part.fraction()) == ("update 20/60, 0:00:09 left, loss ...", 1 / 3)
    part = part_at_work(tmp_path, clock, f"{line}\nsoft_or-0.5: student after update 20: tiny greedy 44.3 +- 2.2\n")
    assert part.state() == "student after update 20: tiny greedy ..." and part.fraction() == 1 / 3
    part = part_at_work(tmp_path, clock, "x" * 10**5 + f"\nall-1.0: {line[13:]}\n", arm=None)  # all arms of a seed
    assert (part.label, part.state()) == ("seed 3", "all-1.0: update 20/60, 0:00:09 left, ...")


def test_what_is_left_of_all_parts(tmp_path, clock):
    every = AllJobs(5, 2, clock)
    assert every.left() is None and every.state() == "0 of 5 have ended" and every.fraction() == 0
    every.seconds += [100.0, 60.0]
    every.running.append(part_at_work(tmp_path, clock, "soft_or-0.5: update 30/60\n"))
    clock.now += 40
    assert every.left() == (2 * 100 + 60) / 2  # two wait, one has worked for 40 s, and two work at a time
    assert every.state() == "2 of 5 have ended, 0:02:10 left" and every.fraction() == 0.5
