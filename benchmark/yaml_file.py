"""YAML as it looks: by version 1.2's core schema, in which `12:00:00`, `010`, `off` and `2026-01-01` are text and `1e-4` is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dfqbench.errors import UserError

# https://yaml.org/spec/1.2.2/#103-core-schema, but digits after a leading zero stay text: an account `007` is not 7, and a field that wants a
# number reads `010` as ten. `<<`, which 1.2 has no more, still merges mappings.
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A key given twice is an error: the one that came later would silently win."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = (key.tag, key.value)
            if name in lines:
                raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice, first in line {lines[name]}", key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that this or a YAML 1.1 reader would take for something else."""


for _kind, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value, 0))


def read_yaml(path: Path, what: str = "", as_written: str = "") -> Any:
    """A file's content. Raises UserError, one line that begins with `what` and the path, where it cannot be read or is not valid YAML.

    as_written: a key of the outermost mapping below which numbers stay the text that the file has.
    """
    place = f"{what} {path}".lstrip()
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if as_written and key.value == as_written and isinstance(value, yaml.MappingNode):
                for _, scalar in value.value:
                    if scalar.tag.endswith((":int", ":float")):
                        scalar.tag = "tag:yaml.org,2002:str"
        return None if node is None else loader.construct_document(node)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{place}: line {line}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{place}: not valid YAML: nested too deep") from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{place}: {where}not valid YAML: {getattr(error, 'problem', None) or str(error).splitlines()[0]}") from None


def value_of(text: str) -> Any:
    """What a value in a file would be. Raises UserError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise UserError(f"{text!r} is not a value as YAML has them") from None


def write_yaml(value: Any, **layout: Any) -> str:
    """Text that `read_yaml` reads as the same value. layout: PyYAML's."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **layout))
