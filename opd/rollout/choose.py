"""The sampler that a configuration names (rollout.engine)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from opd import adapters
from opd.config import Config, StudentSection, TeacherSection
from opd.data import Prompt
from opd.models import LanguageModel, sequence_logprobs
from opd.rollout import Probe, Sampler
from opd.rollout.local import TransformersSampler
from opd.rollout.vllm import VllmSampler

PROBED = 8  # prompts whose logprobs are compared between a sampler and the trainer


def open_sampler(lm: LanguageModel, section: StudentSection | TeacherSection, config: Config, longest: int) -> Sampler:
    """The sampler of a model.

    Args:
        section: names the model; vLLM loads it from there before it takes the trainer's weights.
        longest: tokens of the longest prompt and response together.
    Raises:
        InputError: vLLM does not start, or does not take the model.
    """
    if config.rollout.engine == "vllm":
        return VllmSampler(lm, section, config, longest)
    return TransformersSampler(lm, config.rollout.batch_size)


def evaluation_sampler(sampler: Sampler, lm: LanguageModel, config: Config) -> Sampler:
    """What samples a training student for its evaluations: `sampler`, or one of transformers with eval.batch_size."""
    return sampler if config.rollout.engine == "vllm" else TransformersSampler(lm, config.evaluation_batch)


@contextmanager
def fixed_sampler(
    lm: LanguageModel,
    section: StudentSection | TeacherSection,
    config: Config,
    prompts: Sequence[Prompt],
    longest_response: int,
    before_start: Callable[[], None] = lambda: None,
) -> Iterator[Sampler]:
    """The sampler of a model that does not change meanwhile, checked once against the model itself.

    Args:
        section: where its weights lie.
        prompts: all that it will be asked for.
        longest_response: tokens of the longest response it will be asked for.
        before_start: called before vLLM starts; the trainer's own model is not used after it.
    Raises:
        InputError: as open_sampler.
        RunError: the logprobs of vLLM are not those of the model.
    """
    if config.rollout.engine == "transformers":
        yield TransformersSampler(lm, config.evaluation_batch)
        return
    probe, plain, merged = make_probe(lm, prompts), adapters.beneath(section), {}
    if plain is not section:  # vLLM reads plain models, and gets one that holds the adapters
        merged = {name: weight.cpu() for name, weight in adapters.merged_weights(lm.model)}
    before_start()
    sampler = VllmSampler(lm, plain, config, max(len(p.token_ids) for p in prompts) + longest_response)
    try:
        if merged:
            sampler.take(merged.items, probe)
        else:
            sampler.check_parity(probe)
        yield sampler
    finally:
        sampler.close()


def make_probe(lm: LanguageModel, prompts: Sequence[Prompt]) -> Probe:
    """What the model itself says of a few prompts, always the same ones. Every process calls it."""
    sequences = [prompt.token_ids for prompt in prompts[:PROBED]]
    return Probe(sequences, sequence_logprobs(lm, sequences))
