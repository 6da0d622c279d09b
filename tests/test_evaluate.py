"""Figures against brute force, what is ungraded, and an evaluation that is killed and restarted."""

import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import LOSS, pair_of, random_lm, tiny_config
from helpers import response as row

from opd import accuracy, benchmarks, evaluate
from opd.data import Prompt, Rollout
from opd.errors import InputError
from opd.grading import Grader, Verdict
from opd.models import sampled_vocabulary
from opd.record import evaluation
from opd.record.record import rollout_metrics
from opd.responses import Subject
from opd.rollout.local import TransformersSampler
from opd.verdicts import Graded


class Decided:
    """A grader that returns what it is told, and is asked about no pair."""

    def __init__(self, *verdicts):
        self.verdicts = verdicts
        self.in_turn = itertools.cycle(verdicts or [Verdict(None, False)])

    def grade(self, pairs):
        return list(self.verdicts)

    def start(self, response, reference, answer_lines=False):
        verdict = next(self.in_turn)
        return lambda: verdict

    def equivalent(self, pairs):
        assert not pairs
        return []


def benchmark(k, greedy=False, tokens=12):
    return benchmarks.Benchmark(
        version=1,
        file="none",
        prompt_field="problem",
        answer_field="answer",
        instruction="",
        greedy=greedy,
        k=k,
        temperature=1.0,
        top_p=1.0,
        max_response_tokens=tokens,
        answer_lines=False,
    )


def test_best_at_j_is_the_mean_over_all_draws_and_unbiased():
    """Of five shares with ties; for shares of 0 and 1 it is pass@j. Over all samples of a coin with three sides it is
    the best of two on average, however many were drawn."""
    shares = [0.25, 1.0, 0.5, 0.25, 0.0]
    for j in range(1, 6):
        draws = list(itertools.combinations(shares, j))
        assert accuracy.best_at(shares, j) == pytest.approx(sum(map(max, draws)) / len(draws), rel=1e-12)
        assert accuracy.best_at([1.0, 0.0, 0.0, 1.0, 0.0], j) == pytest.approx(accuracy.pass_at(5, 2, j))
    sides = (0.0, 0.5, 1.0)
    expected = sum(max(pair) for pair in itertools.product(sides, repeat=2)) / 9
    for n in (2, 3, 5):
        worlds = list(itertools.product(sides, repeat=n))
        assert sum(accuracy.best_at(world, 2) for world in worlds) / len(worlds) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_equals_brute_force():
    for n, right in ((1, 0), (1, 1), (4, 1), (6, 3), (7, 7), (8, 2)):
        samples = [True] * right + [False] * (n - right)
        for j in range(1, n + 1):
            draws = list(itertools.combinations(samples, j))
            assert accuracy.pass_at(n, right, j) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majority_equals_brute_force():
    """Against a vote with ties broken by every order of the answers: 7 is right, 9 ungraded, None no vote."""
    rng = random.Random(0)
    verdicts = {"7": True, "8": False, "9": None, None: False}
    for _ in range(300):
        votes = rng.choices([*verdicts], k=5)
        cast = [vote for vote in votes if vote is not None]
        wins = []
        for order in itertools.permutations(sorted(set(cast))):
            wins.append(bool(order) and max(order, key=lambda a: (cast.count(a), -order.index(a))) == "7")
        assert accuracy.majority((vote, verdicts[vote]) for vote in votes) == pytest.approx(
            statistics.fmean(wins) if cast else 0.0
        )


def test_one_right_voter_makes_its_answer_right():
    """One of two equal texts may be ungraded, on a busy machine."""
    assert accuracy.majority([("7", None), ("7", True), ("8", False)]) == 1.0


def majority_of(texts, answer, grader):
    """maj@k of one problem whose samples are these texts, through the rows that an evaluation writes."""
    lm = SimpleNamespace(
        tokenizer=SimpleNamespace(decode=lambda ids, **_: texts[ids[0]] if len(ids) == 1 else "problem")
    )
    prompt = Prompt("p", (0, 0), answer)
    numbered = [(number, Rollout(0, prompt, (i,), "stop")) for i, number in enumerate([-1, *range(len(texts) - 1)])]
    started = [evaluate.start_grading(lm, rollout, grader, False) for _, rollout in numbered]
    rows = evaluate.graded(lm, [(*pair, start) for pair, start in zip(numbered, started, strict=True)], grader)
    assert rows[0]["vote"] is None  # the greedy response takes no part
    return evaluation.summarise(rows)["maj_at_k"]


def test_what_votes_and_what_votes_together():
    halves = [r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{1/2}"]
    with Grader(seconds=60, workers=1) as grader:
        for texts, answer, expected in (
            ([r"\boxed{3}", *halves, r"\boxed{3}", r"\boxed{3 }"], "0.5", 1.0),  # the greedy one would have made a tie
            ([r"\boxed{3}", *halves, r"\boxed{3}", r"\boxed{3}"], "3", 0.0),  # wrong ones vote together too
            ([r"\boxed{3}", *halves, r"\boxed{3}", r"\boxed{3}", r"\boxed{3}"], "0.5", 0.5),  # a tie
            (
                [r"\boxed{3}", *halves, r"\boxed{3}", r"\boxed{3}", r"\boxed{4}", r"\boxed{4}", r"\boxed{04}"],
                "0.5",
                0.5,
            ),
            (
                [r"\boxed{3}", r"\boxed{}", r"\boxed{ }", r"\boxed{$$}", "no", r"\boxed{7}"],
                "7",
                1.0,
            ),  # empty is no answer
            ([r"\boxed{7}", r"\boxed{}", "no"], "7", 0.0),  # nobody votes
        ):
            assert majority_of(texts, answer, grader) == expected, texts


def test_a_summary_by_hand():
    rows = [row("a", -1, True), row("b", -1, None)]
    rows += [row("a", i, c, e) for i, (c, e) in enumerate([(True, "7"), (True, "7"), (False, "8"), (False, None)])]
    rows += [row("b", i, c, e) for i, (c, e) in enumerate([(False, "1"), (None, "2"), (False, "1"), (True, "3")])]
    found = evaluation.summarise(rows)
    assert (found["problems"], found["k"], found["greedy"], found["ungraded"]) == (2, 4, 0.5, 2)
    assert found["greedy_se"] == pytest.approx(0.5)  # of 1 and 0
    a, b = 2 / 4, 1 / 4
    assert found["mean_at_k"] == pytest.approx((a + b) / 2)
    assert found["mean_at_k_se"] == pytest.approx(statistics.stdev([a, b]) / math.sqrt(2))
    passes = [0.5, 0.5, 0.0, 0.5]  # of a and b
    assert found["mean_at_k_se_passes"] == pytest.approx(statistics.stdev(passes) / 2)
    assert found["pass_at"]["1"] == pytest.approx(found["mean_at_k"])
    assert found["pass_at"]["2"] == pytest.approx((5 / 6 + 3 / 6) / 2) and found["pass_at"]["4"] == 1.0
    assert found["maj_at_k"] == 0.5 and found["unformatted"] == 0.1 and found["truncated"] == 0.0
    assert evaluation.line({"b": found}).endswith("ungraded 2")


def test_a_benchmark_that_is_almost_wholly_ungraded_is_almost_wholly_wrong():
    rows = [row(f"p{i}", sample, True if i == 41 else None) for i in range(100) for sample in (-1, 0, 1)]
    found = evaluation.summarise(rows)
    for figure in ("greedy", "mean_at_k", "maj_at_k"):
        assert found[figure] == pytest.approx(0.01)
    assert found["pass_at"] == {"1": pytest.approx(0.01), "2": pytest.approx(0.01)}
    spread = math.sqrt((0.99**2 + 99 * 0.01**2) / 99) / 10  # of a one and 99 zeros
    assert found["greedy_se"] == pytest.approx(spread) and found["mean_at_k_se"] == pytest.approx(spread)
    assert found["mean_at_k_se_passes"] == 0.0 and found["ungraded"] == 297


def test_rollouts_that_are_ungraded_are_not_right():
    rollouts = [Rollout(i, Prompt(str(i), (1,), "7"), (1,), "stop") for i in range(4)]
    grader = Decided(Verdict("7", True), Verdict("x", None), Verdict("y", None), Verdict("8", False))
    metrics = rollout_metrics(rollouts, Graded([""] * 4, grader.grade([])))
    assert (metrics["rollout/accuracy"], metrics["rollout/ungraded"]) == (0.25, 2.0)


class Given:
    """A sampler whose responses are known beforehand."""

    def __init__(self, rollouts):
        self.rollouts = {r.prompt.id: r for r in rollouts}

    def sample(self, prompts, *_):
        return [self.rollouts[prompt.id] for prompt in prompts]


def alone(lm):
    """A model as it is evaluated without a teacher."""
    return Subject(lm, TransformersSampler(lm, 64), len(lm.tokenizer), None)


def test_above_one_percent_of_ungraded_answers_each_benchmark_warns_once(tmp_path, monkeypatch, capsys):
    rollouts = [Rollout(i, Prompt(str(i), (1,), "7"), (1,), "stop") for i in range(200)]
    subject = Subject(random_lm(0), Given(rollouts), 1, None)
    for ungraded in (0, 2, 3):
        grader = Decided(*[Verdict("x", None)] * ungraded, *[Verdict("7", True)] * (200 - ungraded))
        prompts = [r.prompt for r in rollouts]
        both = [benchmarks.LoadedBenchmark(name, benchmark(1), prompts) for name in ("one", "two")]
        out = tmp_path / str(ungraded)
        found = evaluate.evaluate(subject, both, tiny_config(), out, grader)
        lines = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
        if ungraded < 3:
            assert not lines
        else:
            for name, text in zip(("one", "two"), lines, strict=True):
                assert f"3 of 200 answers of {name} " in text and "count as wrong" in text
                assert str(out / f"{name}.jsonl") in text
        rows = [json.loads(text) for text in (out / "two.jsonl").read_text().splitlines()]
        assert [r["correct"] for r in rows] == [None] * ungraded + [True] * (200 - ungraded)
        assert found["two"]["mean_at_k"] == pytest.approx(1 - ungraded / 200) and found["two"]["ungraded"] == ungraded


def responses(folder, name, sampled=True):
    rows = [json.loads(text) for text in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [r["response"] for r in rows if (r["sample"] >= 0) == sampled]


def test_two_benchmarks_with_the_same_problems_are_sampled_with_different_random_numbers(tmp_path):
    lm = random_lm(0)
    prompts = [Prompt(f"p{i}", (2, 3 + i, 5), "7") for i in range(4)]
    for run in ("first", "again"):
        both = [benchmarks.LoadedBenchmark(name, benchmark(2, greedy=True), prompts) for name in ("one", "two")]
        evaluate.evaluate(alone(lm), both, tiny_config(), tmp_path / run, Decided())
    first, again = tmp_path / "first", tmp_path / "again"
    assert responses(first, "one", sampled=False) == responses(first, "two", sampled=False)
    assert all(a != b for a, b in zip(responses(first, "one"), responses(first, "two"), strict=True))
    assert responses(first, "two") == responses(again, "two")


def test_benchmarks_share_requests_and_none_depends_on_how_many_are_asked_for_at_once(tmp_path):
    lm = random_lm(0)
    loaded = [
        benchmarks.LoadedBenchmark(
            name, benchmark(2, greedy=True), [Prompt(f"{name}{i}", (2, 3 + i), "7") for i in range(n)]
        )
        for name, n in (("one", 5), ("two", 2))
    ]
    asked = []

    class Counting(TransformersSampler):
        def sample(self, prompts, *rest):
            asked.append(len(prompts))
            return super().sample(prompts, *rest)

    def rows(name, *settings):
        asked.clear()
        config = tiny_config("eval.reverse_kl=false", *settings)
        subject = Subject(lm, Counting(lm, config.evaluation_batch), len(lm.tokenizer), None)
        evaluate.evaluate(subject, loaded, config, tmp_path / name, Decided())
        return [(tmp_path / name / f"{loaded.name}.jsonl").read_bytes() for loaded in loaded], list(asked)

    small, pieces = rows("small", "eval.batch_size=1")
    large, together = rows("large")
    assert small == large
    assert together == [7, 14]  # the greedy responses of both, and the samples of both
    assert pieces == [4, 3, 4, 4, 4, 2]  # four batches of one at a time


def test_what_the_teacher_cannot_embed_is_not_sampled_where_it_reads_the_responses(tmp_path):
    lm = random_lm(0)
    known = len(lm.tokenizer) - 3
    beyond = [lm.tokenizer.decode([i]) for i in range(known, len(lm.tokenizer))]
    teacher = random_lm(1, name="teacher", vocab_size=known)
    loaded = benchmarks.LoadedBenchmark("one", benchmark(6), [Prompt(f"p{i}", (5 + i, 9), "7") for i in range(6)])
    read = Subject(lm, TransformersSampler(lm, 64), sampled_vocabulary(lm, teacher), pair_of(lm, teacher, LOSS, known))
    found = evaluate.evaluate(read, [loaded], tiny_config(), tmp_path / "read", Decided())
    assert found["one"]["reverse_kl"] > 0
    assert not [text for text in responses(tmp_path / "read", "one") if any(word in text for word in beyond)]
    evaluate.evaluate(alone(lm), [loaded], tiny_config(), tmp_path / "alone", Decided())
    assert [text for text in responses(tmp_path / "alone", "one") if any(word in text for word in beyond)]


@pytest.mark.parametrize(("k", "most", "expected"), [(2, None, [0, 1]), (2, 1, [0]), (2, 9, [0, 1]), (0, 1, [-1])])
def test_the_divergence_is_measured_on_as_many_samples_as_asked_for(k, most, expected, tmp_path):
    lm, teacher = random_lm(0), random_lm(1, name="teacher")
    loaded = benchmarks.LoadedBenchmark(
        "one", benchmark(k, greedy=True), [Prompt(f"p{i}", (5 + i, 9), "7") for i in range(4)]
    )
    pair = pair_of(lm, teacher, LOSS, len(lm.tokenizer))
    subject = Subject(lm, TransformersSampler(lm, 64), len(lm.tokenizer), pair)
    config = tiny_config(f"eval.reverse_kl_samples={json.dumps(most)}")
    found = evaluate.evaluate(subject, [loaded], config, tmp_path, Decided())["one"]
    rows = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    scored = [r for r in rows if "reverse_kl" in r]
    assert sorted((r["id"], r["sample"]) for r in scored) == [(f"p{i}", n) for i in range(4) for n in expected]
    total = sum(r["reverse_kl"] * r["tokens"] for r in scored)
    assert found["reverse_kl"] == pytest.approx(total / sum(r["tokens"] for r in scored))


def test_acceptance_is_that_of_the_scored_tokens(tmp_path, monkeypatch):
    """What a response and the benchmark say of drafts, against the statistics of their tokens, one by one."""
    lm, teacher = random_lm(0), random_lm(1, name="teacher")
    one = benchmark(2, greedy=False)
    loaded = benchmarks.LoadedBenchmark("one", one, [Prompt(f"p{i}", (5 + i, 9), "7") for i in range(4)])
    subject = Subject(lm, TransformersSampler(lm, 64), len(lm.tokenizer), pair_of(lm, teacher, LOSS, len(lm.tokenizer)))
    seen, scoring = [], evaluate.score_update
    monkeypatch.setattr(evaluate, "score_update", lambda *a: seen.append(scoring(*a)) or seen[-1])
    config = tiny_config("eval.reverse_kl_samples=null")
    found = evaluate.evaluate(subject, [loaded], config, tmp_path, Decided())["one"]
    rows, (stats,) = evaluation.read_responses(tmp_path / "one.jsonl"), seen
    lengths, accepted = [], []
    for i, line in enumerate(rows):
        own = stats.rows(stats.sequence_id == i)
        kept = [1 - tv for tv in own.total_variation.tolist()]
        ratio = [min(1.0, math.exp(t - s)) for t, s in zip(own.teacher_logprob, own.student_logprob, strict=True)]
        of_blocks = [
            sum(math.prod(ratio[b : b + j]) * kept[b + j] for j in range(min(4, len(kept) - b)))
            for b in range(len(kept))
        ]
        assert line["tokens"] == len(kept) and line["acceptance"] == pytest.approx(statistics.fmean(kept), abs=1e-6)
        assert line[evaluation.ACCEPTED] == pytest.approx(statistics.fmean(of_blocks), abs=1e-6)
        lengths, accepted = lengths + of_blocks, accepted + kept
    assert found["acceptance"] == pytest.approx(statistics.fmean(accepted)) and 0 < found["acceptance"] < 1
    assert found["accepted_of_4"] == pytest.approx(statistics.fmean(lengths)) and evaluation.ACCEPTED == "accepted_of_4"
    assert "accepted as drafts" in evaluation.line({"one": found})


def test_greedy_alone_and_samples_alone():
    greedy = evaluation.summarise([row("a", -1, True), row("b", -1, False)])
    assert greedy["mean_at_k"] is None and greedy["pass_at"] == {} and greedy["greedy_se"] == pytest.approx(0.5)
    sampled = evaluation.summarise(
        [row("a", 0, True, reverse_kl=0.5, tokens=4), row("a", 1, False, reverse_kl=2.0, tokens=1)]
    )
    assert sampled["greedy"] is None and sampled["mean_at_k"] == 0.5 and sampled["reverse_kl"] == pytest.approx(4 / 5)


def test_the_greedy_responses_divergence_counts_only_without_samples():
    greedy = [row("a", -1, True, reverse_kl=3.0, tokens=2), row("b", -1, True, reverse_kl=1.0, tokens=6)]
    assert evaluation.summarise(greedy)["reverse_kl"] == pytest.approx((3 * 2 + 1 * 6) / 8)
    sampled = [row("a", 0, True, reverse_kl=0.5, tokens=4), row("b", 0, True, reverse_kl=2.0, tokens=1)]
    assert evaluation.summarise([row("a", -1, True), *sampled])["reverse_kl"] == pytest.approx((0.5 * 4 + 2 * 1) / 5)


DATA = os.environ.get("OPD_TEST_DATA")


@pytest.fixture(scope="module")
def math_problems(tmp_path_factory):
    """MATH-500 and AIME 2024, prepared, and benchmark files that read them."""
    if not DATA:
        pytest.skip("OPD_TEST_DATA names no folder with math500/ and aime24/")
    from data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    files = []
    for name in ("math500", "aime24"):
        prepare(name, f"{DATA}/{name}/test.jsonl", out)
        benchmark = json.loads(Path(f"configs/benchmarks/{name}.json").read_text())
        benchmark |= {"file": str(out / name / "test.jsonl"), "k": 3, "greedy": True, "max_response_tokens": 24}
        path = out / f"{name}.json"
        path.write_text(json.dumps(benchmark))
        files.append(str(path))
    return files


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    import torch
    from test_real_models import problem_texts
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        problem_texts(),
        trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            initializer_range=0.1,
        )
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_evaluation_script_killed_and_restarted_gives_the_same_summary(math_problems, tiny_llama, tmp_path):
    def command(out):
        settings = [f"eval.benchmarks={json.dumps(math_problems)}", "student.dtype=float32", "rollout.batch_size=4"]
        words = [part for text in settings for part in ("--set", text)]
        return ["bash", "scripts/eval_math.sh", str(tiny_llama), "--limit", "20", "--out", str(out), *words]

    environment = os.environ | {"OMP_NUM_THREADS": "1", "CONFIG": "configs/qwen3_8b_to_4b.json"}
    whole = subprocess.run(command(tmp_path / "whole"), capture_output=True, text=True, env=environment)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        command(tmp_path / "killed"),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    partial = tmp_path / "killed" / "responses.partial.jsonl"
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 3000) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not (tmp_path / "killed" / "summary.json").exists()
    partial.write_text(partial.read_text() + '{"batch": 7, "respo')  # as if it had died in the middle of a line
    again = subprocess.run(command(tmp_path / "killed"), capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    kept = [
        (int(n), int(of))
        for n, of in re.findall(r"responses.partial.jsonl: (\d+) of (\d+) requests are there", again.stderr)
    ]
    assert len(kept) == 1 and 0 < kept[0][0] < kept[0][1]
    for name in ("math500.jsonl", "aime24.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "killed")]
    for summary in summaries:
        for figures in summary.values():
            assert figures.pop("time/evaluation") > 0
    assert (
        summaries[0] == summaries[1] and summaries[0]["math500"]["problems"] == 20 and summaries[0]["math500"]["k"] == 3
    )
    assert not list((tmp_path / "killed").glob("*.partial.jsonl"))


@pytest.mark.slow
def test_the_main_job_on_prepared_data(math_problems, tiny_llama, tmp_path):
    """Prepared DAPO in, MATH-500 and AIME out, with the paper pair's file and small models."""
    from data.prepare import prepare

    prepared = Path(math_problems[0]).parent
    prepare("aime25", f"{DATA}/aime25/test.jsonl", prepared)
    prepare("dapo_math_17k", f"{DATA}/dapo_math_17k/train.jsonl", prepared)
    settings = {
        "student.path": str(tiny_llama),
        "teacher.path": str(tiny_llama),
        "student.dtype": "float32",
        "teacher.dtype": "float32",
        "data.train": [str(prepared / "dapo_math_17k/train.jsonl")],
        "output_dir": str(tmp_path),
        "data.epochs": None,
        "optim.steps": 2,
        "optim.lr": 1e-3,
        "rollout.prompts_per_step": 2,
        "rollout.n": 2,
        "rollout.max_response_tokens": 12,
        "optim.micro_batch_tokens": 2048,
        "eval.benchmarks": math_problems,
        "eval.k": 1,
        "eval.limit": 3,
    }
    words = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    result = subprocess.run(
        ["bash", "scripts/run_math500_soft_or.sh", "configs/qwen3_8b_to_4b.json", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert (
        all(f"## {name} after update 2" in result.stdout for name in ("math500", "aime24"))
        and "soft_or 0.5" in result.stdout
    )
    assert "paper" not in result.stdout  # the file is of a paper pair, the models are not
    folder = tmp_path / "qwen3_8b_to_4b-reproduce/seed_0/all-1.0"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and "rollout/accuracy" in rows[0]


def test_comparing_two_runs_from_the_command_line(tiny_pair, tmp_path):
    for name, model in (("a", "student"), ("b", "teacher")):
        command = [
            sys.executable,
            "-m",
            "opd.evaluate",
            "--config",
            "configs/tiny.json",
            "--model",
            f"data/tiny/pairs/chain/{model}",
            "--limit",
            "24",
            "--out",
            str(tmp_path / name),
            "--set",
            "eval.reverse_kl=false",
        ]
        assert subprocess.run(command, capture_output=True).returncode == 0
    result = subprocess.run(
        [sys.executable, "-m", "opd.compare", str(tmp_path / "a"), str(tmp_path / "b")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "over problems only: it says nothing about another training" in result.stdout
    assert "tiny greedy: A" in result.stdout and "tiny mean@k: A" in result.stdout and "of 24" in result.stdout


def test_an_evaluation_without_benchmarks_is_refused_and_leaves_nothing(tmp_path):
    for engine in ("transformers", "vllm"):
        with pytest.raises(InputError, match="there is nothing to evaluate"):
            evaluate.command(
                [
                    "--config",
                    "configs/tiny.json",
                    "--model",
                    "data/tiny/pairs/chain/student",
                    "--out",
                    str(tmp_path / engine),
                    "--set",
                    "eval.benchmarks=[]",
                    "--set",
                    f"rollout.engine={engine}",
                ]
            )
    assert not list(tmp_path.iterdir())
