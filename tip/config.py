"""The optional `tip` section of a pair file. `python -m tip.config` prints the JSON schema of pair files."""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from opd.config import Count, doc, schema, strict
from tip.rules import RULES, known

RuleName = Annotated[str, AfterValidator(known), WithJsonSchema({"type": "string", "enum": list(RULES)})]
Quantile = Annotated[float, Field(gt=0, le=1)]
Quadrant = Annotated[int, Field(ge=1, le=4)]


@strict
class TipConfig:
    """Token selection; every key has a default, so a pair file needs no such section."""

    rule: Annotated[
        RuleName,
        doc(
            "Which tokens count. Of TIP (arXiv 2604.14084), with h student entropy and d = KL(P_S || P_T): all; "
            "entropy_sampling (probability proportional to h); soft_or (top of h + d - h d); soft_or_bottom; "
            "divergence (top of d); q3 (top of KL(P_T || P_S) (1 - h)). Controls: random, entropy_topk, "
            "soft_or_sampling, divergence_bottom, quadrant (a set of quadrants). Of others: teachability (TA-OPD, "
            "2605.26844), product (h^alpha (JSD / ln 2)^gamma, sampled), eopd (2603.07079), aopd (2605.06387). Ours: "
            "total_variation (top of total variation, which is also the share of forward KL in the token's loss)."
        ),
    ] = "soft_or"
    retention: Annotated[float, doc("Share of the response tokens kept. Paper: 0.5, 0.2, 0.1.", gt=0, le=1)] = 0.5
    retention_end: Annotated[
        float | None,
        doc(
            "Retention moves linearly from `retention` at update 1 to this at update `retention_steps`, and stays. "
            "null: no schedule.",
            gt=0,
            le=1,
        ),
    ] = None
    retention_steps: Annotated[Count | None, doc("Length of the schedule in updates; null without one.")] = None
    scope: Annotated[
        Literal["update", "running"],
        doc(
            "Whose values normalise an axis (clips, minimum and maximum, percentiles, means). update: all response "
            "tokens of the update, over all micro-batches and ranks. running: an exponential average of the quantiles "
            "of earlier updates; what it remembers is part of a checkpoint."
        ),
    ] = "update"
    running_decay: Annotated[
        float, doc("Weight of the past in each update of the running quantiles (scope running).", ge=0, lt=1)
    ] = 0.8
    budget: Annotated[
        Literal["per_rollout", "per_update"] | None,
        doc(
            "Where the share is counted: floor(retention * m) tokens of each rollout (paper), or of the whole update. "
            "null: as the rule's source does, per_update for teachability and total_variation, else per_rollout."
        ),
    ] = None
    entropy_clip_quantile: Annotated[
        Quantile | None,
        doc("Entropy is capped at this quantile of the update before normalising. null: no cap. Paper: 0.98."),
    ] = 0.98
    divergence_clip_quantile: Annotated[
        Quantile | None, doc("The same for divergence. Paper: null; one outlier then squeezes the axis.")
    ] = None
    normalization: Annotated[
        Literal["minmax", "quantile", "rank"],
        doc(
            "How an axis is mapped to [0, 1]. minmax (paper); quantile: its 5th to 95th percentile, cut; rank: its "
            "place."
        ),
    ] = "minmax"
    quadrant_threshold: Annotated[
        Literal["mean", "quantile", "absolute"],
        doc(
            "What is high: above the mean of the (clipped) axis, above its quantile, or above a number. Not stated in "
            "the paper."
        ),
    ] = "mean"
    quadrant_entropy: Annotated[
        float | None, doc("The quantile, or the number, for entropy divided by ln V; null with mean.", ge=0, le=1)
    ] = None
    quadrant_divergence: Annotated[
        float | None, doc("The quantile, or the number of nats, for KL(P_S || P_T); null with mean.", ge=0)
    ] = None
    quadrants: Annotated[tuple[Quadrant, ...], doc("What rule quadrant keeps, for example [1, 3].")] = (1, 3)
    product_alpha: Annotated[float, doc("Exponent of entropy in rule product.", ge=0)] = 1.0
    product_gamma: Annotated[float, doc("Exponent of JSD / ln 2 in rule product.", ge=0)] = 1.0
    mixture: Annotated[
        Literal["none", "total_variation"] | None,
        doc(
            "Share of forward KL in a token's loss. none: the configured divergence alone; total_variation: the "
            "token's total variation, so that a confident mistake, where the gradient of reverse KL vanishes, is still "
            "learnt from. null: as the rule's source does (eopd, aopd and total_variation have one)."
        ),
    ] = None
    aggregation: Annotated[
        Literal["token_mean", "rollout_mean"],
        doc(
            "token_mean: mean over all kept tokens of the update; rollout_mean: mean of per-rollout means. "
            "Not stated in the paper."
        ),
    ] = "token_mean"

    def retention_at(self, step: int) -> float:
        """The retention ratio of update `step` (from 1)."""
        if self.retention_end is None or self.retention_steps is None:
            return self.retention
        done = min(1.0, (step - 1) / max(self.retention_steps - 1, 1))
        return self.retention + done * (self.retention_end - self.retention)


SECTIONS = {"tip": TipConfig}

if __name__ == "__main__":
    print(json.dumps(schema(SECTIONS), indent=1))
