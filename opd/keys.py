"""Explains the keys of a pair file, from configs/schema.json: python -m opd.keys [SECTION | SECTION.KEY]"""

import difflib
import textwrap

from opd.cli import main
from opd.commands import COMMANDS
from opd.config import ROOT, read_json_object
from opd.errors import InputError


def documented() -> dict[str, str]:
    """SECTION.KEY -> its documentation, and its default where it has one."""
    schema = read_json_object(ROOT / "configs" / "schema.json")
    keys = {}
    for name, key in schema["properties"].items():
        section = schema["$defs"][key["$ref"].rpartition("/")[2]]["properties"] if "$ref" in key else {"": key}
        for inner, about in section.items():
            default = f" Default: {about['default']!r}." if "default" in about else ""
            keys[f"{name}.{inner}".rstrip(".")] = about.get("description", "") + default
    return keys


def command(arguments: list[str]) -> None:
    wanted, keys = COMMANDS["config"].parser().parse_args(arguments).key, documented()
    shown = {key: text for key, text in keys.items() if wanted in (None, key, key.partition(".")[0])}
    if not shown:
        near = difflib.get_close_matches(wanted, [*keys, *(key.partition(".")[0] for key in keys)], 1)
        hint = f" Did you mean {near[0]!r}?" if near else " Without an argument all keys are shown."
        raise InputError(f"there is no key {wanted[:80]!r}.{hint}")
    for key, text in shown.items():
        print(textwrap.fill(text, 100, initial_indent=f"{key}: ", subsequent_indent="    "))


if __name__ == "__main__":
    main(command)
