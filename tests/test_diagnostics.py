"""Diagnostics and token dumps: by hand on typed numbers, and as files of a run."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import token_stats_of
from runs import words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd import cli
from opd.grading import extract
from opd.hooks import TokenWeights
from opd.record import dump
from tip import analyze
from tip import train as tip_train
from tip.config import TipConfig
from tip.diagnostics import TipObserver, correlation, jaccard, keep_by_every_rule, kept_by_decile, max_over_p99
from tip.rules import RULES
from tip.weighter import TipWeighter


def stats(h, d):
    n = len(h)
    return token_stats_of(
        sequence_id=torch.zeros(n).long(),
        position=torch.arange(n),
        vocab_size=7,
        step=3,
        student_entropy=torch.tensor(h) * math.log(7),
        reverse_kl=torch.tensor(d),
        student_logprob=torch.zeros(n),
        teacher_logprob=torch.full((n,), math.log(0.5)),
        total_variation=torch.full((n,), 0.25),
        reverse_kl_energy=torch.ones(n),
        forward_kl_energy=torch.ones(n),
    )


def diagnose(h, d, kept, **options):
    observer = TipObserver(TipWeighter(TipConfig(**options)))
    return observer.diagnose(stats(h, d), TokenWeights(weights=torch.tensor(kept, dtype=torch.float32)))


def test_scalars_by_hand():
    h = [0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0]
    d = [0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1]
    kept = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    found = diagnose(h, d, kept, retention=0.4, rule="divergence", entropy_clip_quantile=None).scalars
    # entropy keeps tokens 0 1 8 7; Soft-OR 0 2 1 8 (1, 1, .889, .778)
    assert found["tip/jaccard_entropy"] == pytest.approx(2 / 6) and found["tip/jaccard_soft_or"] == pytest.approx(3 / 5)
    assert [found[f"tip/kept_by_entropy_decile_{i}"] for i in range(10)] == [0, 1, 1, 0, 0, 0, 0, 0, 1, 1]
    hm, dm = sum(h) / 10, sum(d) / 10
    covariance = sum((a - hm) * (b - dm) for a, b in zip(h, d, strict=True))
    expected = covariance / math.sqrt(sum((a - hm) ** 2 for a in h) * sum((b - dm) ** 2 for b in d))
    assert found["tip/corr_entropy_divergence"] == pytest.approx(expected, abs=1e-6)
    assert found["speculative/acceptance"] == 0.75
    whole = [0.75, 0.75 * 1.5, 0.75 * 1.75, 0.75 * 1.875]  # accepted tokens of a block of 1 to 4
    assert found["speculative/accepted_of_4"] == pytest.approx((7 * whole[3] + whole[2] + whole[1] + whole[0]) / 10)
    # p99 of ten values lies .91 of the way from .1 to 5
    assert found["tip/divergence_max_over_p99"] == pytest.approx(5 / (0.1 + 0.91 * 4.9), rel=1e-6)


def test_the_small_functions():
    yes, no = torch.tensor([True, True]), torch.tensor([False, False])
    assert jaccard(yes, no) == 0 and jaccard(no, no) == 1 and jaccard(yes, torch.tensor([True, False])) == 0.5
    assert correlation(torch.ones(3), torch.arange(3)) == 0 and correlation(
        torch.arange(3), -torch.arange(3)
    ) == pytest.approx(-1)
    assert max_over_p99(torch.zeros(5)) == 1 and max_over_p99(torch.cat([torch.zeros(999), torch.ones(1)])) == 1e9
    assert kept_by_decile(torch.tensor([0.3, 0.1]), torch.tensor([True, False])) == [0, 1] + [0] * 8


def test_a_weights_rule_is_compared_at_the_share_it_keeps():
    h, d = [0.4, 0.3, 0.2, 0.1], [0.0, 0.0, 3.0, 4.0]
    found = diagnose(h, d, [0, 0, 1, 1], rule="quadrant", retention=0.25).scalars
    assert found["tip/jaccard_entropy"] == 0  # two of four, not floor(.25 * 4) = 1


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_label_says_the_retention_also_in_a_run_with_a_schedule(step):
    """A run that goes from all tokens to a tenth: its dump shows what each rule keeps at 50, 20 and 10 % all the
    same."""
    columns = dict(zip(("h", "d"), torch.rand(2, 20, generator=torch.Generator().manual_seed(0)).tolist(), strict=True))
    update = dataclasses.replace(stats(**columns), step=step)
    config = TipConfig(rule="divergence", retention=1.0, retention_end=0.1, retention_steps=5)
    names = ("divergence", "entropy_topk", "soft_or_sampling", "random", "all")
    found = keep_by_every_rule(update, config, (0.5, 0.2, 0.1), torch.Generator().manual_seed(0), names)
    counts = {"0.5": 10, "0.2": 4, "0.1": 2}  # of 20 tokens
    expected = {f"{name}@{share}": count for name in names[:-1] for share, count in counts.items()} | {"all": 20}
    assert {label: int(kept.sum()) for label, kept in found.items()} == expected
    best = sorted(range(20), key=lambda i: -columns["d"][i])
    assert all(set(found[f"divergence@{r}"].nonzero().flatten().tolist()) == set(best[:n]) for r, n in counts.items())


def test_warnings():
    h, d = [0.1 * i for i in range(10)], [1.0] * 9 + [0.0]
    assert not diagnose(h, d, [1] * 10).warnings
    little = diagnose(h, [9.0] + [0.1] * 9, [0] * 9 + [1]).warnings["little_mass"]
    assert "1.0 % of the divergence" in little
    spiky = [0.01] * 999 + [100.0]
    h = [0.0] * 600 + [0.5] * 400
    squeezed = diagnose(h, spiky, [1] * 1000)
    assert squeezed.warnings["squeezed"].endswith("Set tip.normalization=quantile.")
    assert "squeezed" not in diagnose(h, spiky, [1] * 1000, normalization="quantile").warnings
    assert "squeezed" not in diagnose(h, spiky, [1] * 1000, rule="divergence").warnings
    assert "low_entropy_cut" not in squeezed.warnings  # mean .2, median 0
    options = {"quadrant_threshold": "absolute", "quadrant_divergence": 1.0}
    h = [0.2] * 600 + [0.5] * 400
    low = diagnose(h, spiky, [1] * 1000, quadrant_entropy=0.1, **options).warnings["low_entropy_cut"]
    assert "up to h = 0.1, below the median 0.2" in low
    assert "low_entropy_cut" not in diagnose(h, spiky, [1] * 1000, quadrant_entropy=0.3, **options).warnings
    assert "low_entropy_cut" not in diagnose([0.3] * 1000, spiky, [1] * 1000).warnings  # all equal: mean and median
    assert "low_entropy_cut" in diagnose([0.1] * 400 + [0.5] * 600, spiky, [1] * 1000).warnings  # mean .34, median .5


@pytest.fixture(scope="module")
def run_folder(tiny_pair, tmp_path_factory):
    """Six updates of Soft-OR 20 % by the command, with diagnostics and dumps."""
    out = tmp_path_factory.mktemp("diagnosed")
    settings = [
        "optim.steps=6",
        "eval.benchmarks=[]",
        "log.diagnostics_every=3",
        "log.token_dump_every=2",
        "log.token_dump_rollouts=3",
        "tip.retention=0.2",
        "run_name=run",
        f"output_dir={out}",
        "optim.micro_batch_tokens=500",
    ]
    tip_train.command(words(*settings))
    return out / "run"


def test_a_run_logs_every_diagnostic_in_both_places(run_folder):
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    names = {"tip/jaccard_soft_or", "tip/jaccard_entropy", "tip/corr_entropy_divergence", "tip/divergence_max_over_p99"}
    names |= {f"tip/kept_by_entropy_decile_{i}" for i in range(10)}
    names |= {f"tip/{what}_q{q}" for what in ("share", "mass", "kept", "energy") for q in (1, 2, 3, 4)}
    names |= {"tip/retained", "tip/mass_covered", "tip/threshold_entropy", "tip/threshold_divergence"}
    board = EventAccumulator(str(run_folder / "tensorboard"), {"histograms": 0, "scalars": 0})
    board.Reload()
    for row in rows:
        due = row["step"] % 3 == 0
        assert ("tip/jaccard_soft_or" in row) == due
        assert not due or (names <= set(row) and row["tip/jaccard_soft_or"] == 1)
    assert [event.step for event in board.Scalars("tip/jaccard_entropy")] == [3, 6]
    for name in ("tip/entropy", "tip/divergence", "tip/divergence_kept", "tip/score"):
        assert [event.step for event in board.Histograms(name)] == [3, 6]
    counts = [sum(event.histogram_value.bucket) for event in board.Histograms("tip/divergence_kept")]
    assert counts == [rows[2]["tokens/kept"], rows[5]["tokens/kept"]]


def test_a_token_dump_holds_everything_and_agrees_with_the_run(run_folder):
    assert sorted(p.name for p in (run_folder / "tokens").iterdir()) == [f"step_00000{i}.jsonl" for i in (2, 4, 6)]
    dumped = [json.loads(line) for line in (run_folder / "tokens" / "step_000004.jsonl").read_text().splitlines()]
    assert [row["sequence_id"] for row in dumped] == [0, 1, 2] and {row["step"] for row in dumped} == {4}
    selecting = [name for name, rule in RULES.items() if rule.mechanic != "weights"]
    keeps = {f"keep/{name}@{r}" for name in selecting for r in (0.5, 0.2, 0.1)} | {
        f"keep/{name}" for name in set(RULES) - set(selecting)
    }
    for row in dumped:
        n = len(row["token_ids"])
        assert "".join(row["tokens"]) == row["response"] and keeps <= set(row)
        columns = {
            k: v
            for k, v in row.items()
            if k in dump.STATS or k.startswith("keep/") or k in ("weight", "quadrant", "score")
        }
        assert len(columns) == len(dump.STATS) + len(keeps) + 3 and all(len(v) == n for v in columns.values())
        # the rule of the run is one of the rules: its keep bit is the weight that was used
        assert row["keep/soft_or@0.2"] == [int(w > 0) for w in row["weight"]] and sum(row["weight"]) == int(0.2 * n)
        best = sorted(range(n), key=lambda i: (-row["score"][i], i))[: int(0.2 * n)]
        assert sorted(best) == [i for i, w in enumerate(row["weight"]) if w]
        assert set(row["quadrant"]) <= {1, 2, 3, 4}
        assert row["verdict"] == [float(extract(row["response"].removesuffix("<|im_end|>")) == row["answer"])] * n
        for who in ("student", "teacher"):
            for place, top in enumerate(row[f"{who}_top5"]):
                assert len(top) == 5 and [p for _, p in top] == sorted((p for _, p in top), reverse=True)
                sampled = [p for text, p in top if text == row["tokens"][place]]
                if sampled:
                    assert sampled[0] == pytest.approx(math.exp(row[f"{who}_logprob"][place]), abs=2e-6)


def test_analysis_of_the_embedded_pair(tiny_pair, tmp_path, capsys):
    options = ["--config", "configs/tiny.json", "--prompts", "24", "--oracle-tokens", "200", "--out", str(tmp_path)]
    analyze.command(options)
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out + "\n"
    for name in ("coverage", "overlap_0.5", "overlap_0.2", "overlap_0.1", "quadrants"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000 and "</svg>" in (tmp_path / f"{name}.svg").read_text()
    page = (tmp_path / "analysis.html").read_text()
    assert 'name="viewport"' in page and page.count("data:image/png") == 5 and "Q3: overconfident and wrong" in page
    rules, quadrants = found["rules"], found["quadrants"]
    for what in ("share", "mass"):
        assert sum(quadrants[f"{what}_q{q}"] for q in (1, 2, 3, 4)) == pytest.approx(1)
    # Soft-OR 20 % covers the divergence, entropy 20 % does not, and the top of a sum covers it best
    covered = {label: rule["covered"] for label, rule in rules.items()}
    assert covered["soft_or@0.2"]["reverse_kl"] > 0.85
    assert covered["soft_or@0.2"]["reverse_kl"] > covered["entropy_topk@0.2"]["reverse_kl"] + 0.25
    for label, shares in covered.items():
        assert (
            label.partition("@")[2] != "0.2"
            or shares["reverse_kl"] <= covered["divergence@0.2"]["reverse_kl"] + 1e-9
            or (RULES[label.partition("@")[0]].budget == "per_update")
        )
        assert all(0 <= share <= 1 + 1e-9 for share in shares.values())
    assert rules["soft_or@0.5"]["retained"] == pytest.approx(0.487, abs=0.02)  # floor of half of 37
    assert rules["total_variation@0.1"]["retained"] == pytest.approx(0.1, abs=0.002)
    assert rules["random@0.5"]["draws"] == 8 and rules["soft_or@0.5"]["draws"] == 1
    for matrix in found["overlap"].values():
        assert all(matrix[a][a] == 1 and matrix[a][b] == matrix[b][a] for a in matrix for b in matrix)
    oracle = found["oracle"]
    assert 150 < oracle["tokens"] <= 200 and oracle["rules"]["all"]["cosine"]["all"] == pytest.approx(
        oracle["cosine_of_all"]
    )
    assert oracle["rules"]["random"]["score_weight"] is None
    # tokens with signal gain most, and the signs of opposite scores are opposite. The top half has the direction of all
    # tokens, the bottom half nearly none of it. That is .06 to .2, as the pair comes out, which every processor trains
    # to other bits
    assert oracle["cosine_of_all"] > 0
    for up, down in (("soft_or", "soft_or_bottom"), ("divergence", "divergence_bottom")):
        assert oracle["rules"][up]["score_gain"] > 0.2
        assert oracle["rules"][up]["score_gain"] == pytest.approx(-oracle["rules"][down]["score_gain"])
        assert oracle["rules"][up]["cosine"][f"{up}@0.5"] > 0.9 * oracle["cosine_of_all"]
        assert oracle["rules"][down]["cosine"][f"{down}@0.5"] < 0.6 * oracle["cosine_of_all"]


@pytest.mark.parametrize(
    "settings",
    [
        ("tip.rule=quadrant", "tip.scope=running"),
        ("tip.rule=soft_or", "tip.scope=running", "tip.retention=0.2"),
        ("tip.rule=entropy_sampling",),
    ],
    ids=" ".join,
)
def test_a_dump_shows_scores_and_quadrants_as_the_update_was_weighed(settings, tiny_pair, tmp_path):
    texts = [
        "optim.steps=4",
        "optim.warmup_steps=1",
        "eval.benchmarks=[]",
        "log.diagnostics_every=4",
        "log.token_dump_every=4",
        f"output_dir={tmp_path}",
        "log.token_dump_rollouts=32",
        "run_name=run",
        "optim.micro_batch_tokens=500",
        *settings,
    ]
    tip_train.command(words(*texts))
    dumped = [json.loads(line) for line in (tmp_path / "run" / "tokens" / "step_000004.jsonl").read_text().splitlines()]
    for row in dumped:
        kept = [i for i, w in enumerate(row["weight"]) if w]
        if settings[0] == "tip.rule=quadrant":
            assert kept == [i for i, q in enumerate(row["quadrant"]) if q in (1, 3)]
        elif settings[0] == "tip.rule=soft_or":
            lowest = min(row["score"][i] for i in kept)
            assert sum(score > lowest for score in row["score"]) < len(kept)
        else:  # its own keep bit is what it drew
            assert [i for i, bit in enumerate(row["keep/entropy_sampling@0.5"]) if bit] == kept
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[3])
    if settings[0] == "tip.rule=quadrant":
        assert [metrics[f"tip/kept_q{q}"] for q in (1, 2, 3, 4)] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    "options,message",
    [
        (["--prompts", "0"], "--prompts: got .0., expected a whole number from 1"),
        (["--oracle-tokens", "-1"], "--oracle-tokens: got .-1., expected a whole number from 0"),
        (["--set", "tip.quadrants=[]"], "quadrants is empty"),
        (["--set", "tip.scope=running"], "no past"),
        (["--prompts", "5000"], "expected at most half"),
    ],
)
def test_analysis_refuses_bad_input(options, message, tmp_path, tiny_pair):
    with pytest.raises(cli.InputError, match=message):
        analyze.command(["--config", "configs/tiny.json", "--out", str(tmp_path / "out"), *options])
    assert not (tmp_path / "out").exists()
