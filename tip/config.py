"""The optional `tip` section of a pair file. `python -m tip.config` prints the JSON schema of pair files."""

import json
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from opd.config import Config, Count, doc, schema, strict
from opd.errors import InputError
from tip.divergences import DIVERGENCES
from tip.rules import RULES


def _known_rule(name: str) -> str:
    if name not in RULES:
        raise ValueError(f"expected one of {', '.join(RULES)}")
    return name


RuleName = Annotated[str, AfterValidator(_known_rule), WithJsonSchema({"type": "string", "enum": list(RULES)})]
Retention = Annotated[float, Field(gt=0, le=1)]
Quantile = Annotated[float, Field(gt=0, le=1)]
Quadrant = Annotated[int, Field(ge=1, le=4)]


@strict
class TipConfig:
    """Which tokens count. Every key has a default, so a pair file needs no such section."""

    rule: Annotated[
        RuleName,
        doc(
            "The rule that decides which tokens count. h is the student's entropy and d the divergence of `axis`. From "
            "TIP (arXiv 2604.14084): all; entropy_sampling, with probability proportional to h; soft_or, the top of "
            "h + d - h d; soft_or_bottom; divergence, the top of d; q3, the top of KL(P_T || P_S) (1 - h). Controls: "
            "random; first_k, the first tokens of each response, as ESR (2605.27028) does; first_turns, every turn of "
            "a conversation but the last; last_turn; entropy_topk; soft_or_sampling; divergence_bottom; quadrant, a "
            "set of quadrants. From other papers: teachability "
            "(TA-OPD, 2605.26844); product, sampled by h^alpha (JSD / ln 2)^gamma; eopd (2603.07079); aopd "
            "(2605.06387); iw_opd (2606.22600), a weight that falls along the response; tropd (2606.01249), the weight "
            "min(q/p, 1) of the sampled token. Of this project: total_variation, whose score is also the share of "
            "forward KL in a token's loss."
        ),
    ] = "soft_or"
    retention: Annotated[Retention, doc("The share of the tokens that is kept. The paper takes 0.5, 0.2, 0.1.")] = 0.5
    retention_end: Annotated[
        Retention | None,
        doc(
            "The retention moves linearly from `retention` at the first update to this at update `retention_steps`, "
            "and stays there. null: the retention is constant."
        ),
    ] = None
    retention_steps: Annotated[
        Count | None, doc("The update at which the retention reaches `retention_end`. null: it is constant.")
    ] = None
    axis: Annotated[
        Literal["reverse_kl", "forward_kl", "jsd", "total_variation"],
        doc(
            "The divergence that is d, in rules, quadrants, metrics, figures and the token map. reverse_kl: "
            "KL(P_S || P_T), as in the paper; forward_kl: KL(P_T || P_S); jsd: JSD at loss.jsd_beta; total_variation: "
            "1/2 sum |P_S - P_T|. Rules whose formula names a divergence keep theirs: q3, teachability, product, "
            "total_variation. The loss is loss.divergence."
        ),
    ] = "reverse_kl"
    scope: Annotated[
        Literal["update", "running"],
        doc(
            "The tokens whose quantiles clip and normalise an axis. update: all response tokens of the update, over "
            "all micro-batches and ranks. running: an exponential average of the quantiles of earlier updates, which "
            "checkpoints hold."
        ),
    ] = "update"
    running_decay: Annotated[
        float, doc("The weight of the past when scope running averages in the quantiles of an update.", ge=0, lt=1)
    ] = 0.8
    budget: Annotated[
        Literal["per_rollout", "per_update"] | None,
        doc(
            "Where the retention counts. per_rollout, as in the paper: floor(retention * m) of the m tokens of each "
            "rollout. per_update: of the whole update. null: as the rule's paper does, which is per_update for "
            "teachability and total_variation, else per_rollout."
        ),
    ] = None
    entropy_clip_quantile: Annotated[
        Quantile | None,
        doc("Entropy is capped at this quantile before it is normalised. null: no cap. The paper takes 0.98."),
    ] = 0.98
    divergence_clip_quantile: Annotated[
        Quantile | None,
        doc("The same cap for divergence. null, as in the paper: no cap, so one outlier squeezes the axis."),
    ] = None
    normalization: Annotated[
        Literal["minmax", "quantile", "rank", "absolute"],
        doc(
            "How an axis is mapped to [0, 1]. minmax, as in the paper: from its minimum to its maximum. quantile: from "
            "its 5th to its 95th percentile, cut. rank: to its rank among the tokens. absolute: divided by its largest "
            "possible value, without a clip, so that a score needs no other token; entropy by ln V, JSD by ln 2, total "
            "variation by 1; it needs axis jsd or total_variation."
        ),
    ] = "minmax"
    quadrant_threshold: Annotated[
        Literal["mean", "quantile", "absolute"],
        doc("Where an axis becomes high: above its mean, above a quantile, or above a number. The paper does not say."),
    ] = "mean"
    quadrant_entropy: Annotated[
        float | None, doc("The quantile or the number for entropy divided by ln V; null for the mean.", ge=0, le=1)
    ] = None
    quadrant_divergence: Annotated[
        float | None, doc("The quantile, or the number, for the divergence of `axis`; null for the mean.", ge=0)
    ] = None
    quadrants: Annotated[tuple[Quadrant, ...], doc("What the rule quadrant keeps, for example [1, 3].")] = (1, 3)
    product_alpha: Annotated[float, doc("The exponent of h in the rule product.", ge=0)] = 1.0
    product_gamma: Annotated[float, doc("The exponent of JSD / ln 2 in the rule product.", ge=0)] = 1.0
    aopd_threshold: Annotated[
        float, doc("The rule aopd takes forward KL up to this log q/p of the sampled token, in nats.")
    ] = 0.0
    iw_gain: Annotated[
        float, doc("The g in the weight 1 + g (1 - share of the response's disagreement so far) of iw_opd.", ge=0)
    ] = 1.0
    frozen: Annotated[
        Literal["none", "measure", "select"],
        doc(
            "Whether the step-0 student and the teacher score the rollouts of every update too. measure: the metric "
            "tip/drift is 1 - the Jaccard overlap of the kept tokens with those that the rule would keep by these "
            "scores. select: the rule keeps those, as a control. Each process then holds both models twice. A rule "
            "that reads no statistic has no drift."
        ),
    ] = "none"
    rollout_weight: Annotated[
        Literal["none", "reward", "pass_rate", "right", "wrong"],
        doc(
            "A factor of all token weights of a rollout, whatever the rule. reward: softmax(verdict / reward_beta) "
            "over the rollouts of the update. pass_rate: p (1 - p), p being the share of right rollouts of the prompt "
            "(PACED, 2603.11178); it needs rollout.n above 1. right, wrong: only the right or the wrong rollouts "
            "count. All but none need reference answers; the factor of an unknown verdict is 0."
        ),
    ] = "none"
    reward_beta: Annotated[
        float, doc("The temperature of rollout_weight reward. The smaller it is, the more the right ones count.", gt=0)
    ] = 1.0
    mixture: Annotated[
        Literal["none", "total_variation"] | None,
        doc(
            "The share of forward KL in a token's loss. none: no share. total_variation: the token's total variation, "
            "so that the student learns from a confident mistake too, where the gradient of reverse KL vanishes. null: "
            "as the rule says; eopd, aopd and total_variation have a share."
        ),
    ] = None
    aggregation: Annotated[
        Literal["token_mean", "rollout_mean"],
        doc(
            "token_mean: the mean over all kept tokens of the update. rollout_mean: the mean of the means of the "
            "rollouts. The paper does not say."
        ),
    ] = "token_mean"

    def retention_at(self, step: int) -> float:
        """The retention of update `step`, which counts from 1."""
        if self.retention_end is None or self.retention_steps is None:
            return self.retention
        progress = min(1.0, (step - 1) / max(self.retention_steps - 1, 1))
        return self.retention + progress * (self.retention_end - self.retention)


def check_combinations(config: TipConfig) -> None:
    """Raises InputError for keys that do not go together."""
    if (config.retention_end is None) != (config.retention_steps is None):
        raise InputError(
            f"tip: retention_end is {config.retention_end} and retention_steps is {config.retention_steps}: a schedule "
            "needs both, a constant retention neither."
        )
    how, given = config.quadrant_threshold, (config.quadrant_entropy, config.quadrant_divergence)
    if given.count(None) != (2 if how == "mean" else 0):
        raise InputError(
            f"tip: quadrant_threshold is {how!r}, quadrant_entropy {given[0]} and quadrant_divergence {given[1]}: "
            "mean takes neither, quantile and absolute take both."
        )
    if how == "quantile" and config.quadrant_divergence > 1:
        raise InputError(f"tip: quadrant_divergence is {config.quadrant_divergence}, expected a quantile in [0, 1].")
    if config.normalization == "absolute":
        _check_absolute(config)
    if config.frozen != "none" and config.scope == "running":
        raise InputError(
            f"tip: frozen is {config.frozen!r} and scope is 'running', which remembers the student's own scores. Set "
            "tip.scope=update."
        )
    if not config.quadrants:
        raise InputError("tip: quadrants is empty, expected some of 1, 2, 3, 4.")


def _check_absolute(config: TipConfig) -> None:
    if DIVERGENCES[config.axis].largest is None:
        bounded = " or ".join(repr(name) for name, d in DIVERGENCES.items() if d.largest is not None)
        raise InputError(
            f"tip: normalization is 'absolute' and axis is {config.axis!r}, which has no largest value to divide by. "
            f"Set tip.axis to {bounded}, or another tip.normalization."
        )
    if config.divergence_clip_quantile is not None:
        raise InputError(
            f"tip: normalization is 'absolute' and divergence_clip_quantile is {config.divergence_clip_quantile}: a "
            "quantile depends on other tokens. Set it to null."
        )


def check_rollouts(tip: TipConfig, config: Config) -> None:
    """Raises InputError for a factor of rollouts that is 0 for every rollout of such a run."""
    if tip.rollout_weight == "pass_rate" and config.rollout.n == 1:
        raise InputError(
            "tip.rollout_weight is 'pass_rate' and rollout.n is 1: of one rollout the pass rate p is 0 or 1, so p (1 - "
            "p) is 0 and nothing would be learnt. Set rollout.n to 2 or more, or another tip.rollout_weight."
        )


SECTIONS = {"tip": TipConfig}

if __name__ == "__main__":
    print(json.dumps(schema(SECTIONS), indent=1))
