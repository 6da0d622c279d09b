"""Messages as chat templates of transformers take them: tools, parts, and the forms in which data sets hold them."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd.config import load_config
from opd.data import make_prompts, read_problems
from opd.errors import InputError

# As templates of tool-calling models do: a call is an object, what a tool returned is a turn of its own.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    "{{ f.name }}{% for k, v in f.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
CALL = {"name": "mod", "arguments": {"a": 7}}


def prompts(tmp_path, turns, instruction=""):
    """The texts that a tool-calling template makes of these messages, in a JSONL file."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"q": turns}) + "\n")
    characters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, "?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, chat_template=TEMPLATE)
    data = replace(load_config("configs/tiny.json")[0].data, max_prompt_tokens=1000)
    found = make_prompts(read_problems(path, "q", None), tokenizer, data, "p", instruction)
    return ["".join(map(chr, prompt.token_ids)) for prompt in found]


@pytest.mark.parametrize(
    "calling",
    [
        {"content": "", "tool_calls": [{"type": "function", "id": "1", "function": CALL}]},
        {"content": None, "tool_calls": [{"function": CALL}]},
        {"tool_calls": [CALL]},
        {"content": None, "tool_calls": [{"function": CALL | {"arguments": '{"a": 7}'}}]},  # as OpenAI's API has it
    ],
)
def test_a_tool_is_called_and_answers(calling, tmp_path):
    turns = [
        {"role": "user", "content": "1+6", "tool_calls": None},
        {"role": "assistant", **calling},
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "mod"},
    ]
    (text,) = prompts(tmp_path, turns, instruction="0")
    assert text == (
        "<|im_start|>user\n1+6<|im_end|>\n<|im_start|>assistant\nmoda=7<|im_end|>\n<|im_start|>tool\n70<|im_end|>\n"
    )


def test_parts_are_put_together(tmp_path):
    turns = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]}]
    assert prompts(tmp_path, turns, " mod10?") == ["<|im_start|>user\n1+2 mod10?<|im_end|>\n"]


@pytest.mark.parametrize(
    "turns, message",
    [
        (["x"], 'message 1 is "x", expected {"role": ..., "content": ...}.'),
        ([{"content": "x"}], 'message 1 is {"content": "x"}, expected {"role"'),
        ([{"role": "user", "content": "x"}, {"role": "user"}], "message 2 has the content null, expected a text"),
        ([{"role": "user", "content": 3}], "message 1 has the content 3"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            'message 1, part 1 is {"type": "image_url", "image_url": "x"}, expected {"type": "text", "text": ...}. '
            "Models read text alone.",
        ),
        ([{"role": "user", "content": ["x"]}], 'message 1, part 1 is "x", expected {"type": "text"'),
        ([{"role": "assistant", "tool_calls": {"name": "f"}}], 'has the tool_calls {"name": "f"}, expected a list'),
        ([{"role": "assistant", "tool_calls": ["f"]}], 'has the tool call "f", expected a list of {"type"'),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], 'has the tool call {"function": {}}, expected'),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "message 1, arguments of 'f': not JSON",
        ),
        ([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}], "message 1 calls 'f' with [1]"),
    ],
)
def test_faults_name_line_field_and_message(turns, message, tmp_path):
    with pytest.raises(InputError) as caught:
        prompts(tmp_path, turns)
    assert str(caught.value).startswith(f"{tmp_path}/p.jsonl, line 1: field 'q', ")
    assert message in str(caught.value)
