"""A config as it is written: a YAML file and `key.path=value` on the command line, before anything is checked.

YAML 1.1 reads `yes` as a boolean, `010` as 8 and `12:30` as 750. Under a key that wants text, what was written is
taken; under any other, numbers in these two forms are refused.
"""

import contextlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from ptune_dist.errors import UserError

BARE_TEMPLATE = re.compile(r"(^|[\s:\[{,-])\{[{%]")
QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}": kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}
STR_TAG = "tag:yaml.org,2002:str"
NULL_TAG = "tag:yaml.org,2002:null"
MERGE_TAG = "tag:yaml.org,2002:merge"
MISREAD = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")  # octal, or in base 60
NULLS = ("", "~", "null", "Null", "NULL")
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")  # YAML 1.1 wants 1.0e-3
ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
MAX_BYTES = 2**20
MAX_NODES = 200_000  # with what aliases repeat
# What PyYAML raises, beside its own errors, for values that their tags do not fit.
MISFITS = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class ConfigLoader(yaml.SafeLoader):
    """YAML without dates, which stay text, and with 1e-3 as a number."""


ConfigLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def read_yaml(path: str | Path, text_keys: Collection[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises UserError naming file and line.

    text_keys: dotted keys under which scalars are text, as they are written.
    """
    text = read_text(path)
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(text)
            text = text.replace("\t", " ")  # JSON may be indented with tabs, and its strings have none
    try:
        raw = load_text(text, text_keys)
    except yaml.YAMLError as error:
        raise UserError(describe_yaml_error(error, path, text)) from None
    except RecursionError:
        raise UserError(f"{path}: not a config: nested too deeply") from None
    except MISFITS as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if raw is None:
        raise UserError(f"{path}: the config is empty: it needs at least output_dir, model and data (see README.md)")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, found {type(raw).__name__}")
    return raw


def read_text(path: str | Path) -> str:
    """The text of a config file. Raises UserError."""
    path = Path(path)
    try:
        if path.is_dir() and (path / "config.yaml").is_file():
            raise UserError(
                f"{path}: the folder of a run, and a config is needed: {path}/config.yaml. evaluate, generate and "
                "export take the folder"
            )
        if path.is_dir():
            raise UserError(f"{path}: a folder, and a config is a YAML file")
        if path.suffix in ROWS:
            raise UserError(f"{path}: rows, and no config: a YAML file names them in data.train")
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: not a config: it is larger than {MAX_BYTES >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def load_text(text: str, text_keys: Collection[str], key: str = "") -> Any:
    """The value in a YAML text, which stands at `key` of the config. Raises YAMLError, RecursionError or MISFITS."""
    loader = ConfigLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        count_nodes(node, {})
        take_as_written(node, key, text_keys, set())
        return loader.construct_document(node)
    finally:
        loader.dispose()


def count_nodes(node: yaml.Node, sizes: dict[int, int]) -> int:
    """The nodes below and with this one, repeated ones too. Raises ConstructorError where there are too many."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise wrong("an alias that contains itself", node)
        return sizes[id(node)]
    sizes[id(node)] = 0  # it is being counted
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    sizes[id(node)] = 1 + sum(count_nodes(child, sizes) for child in children)
    if sizes[id(node)] > MAX_NODES:
        raise wrong(f"more than {MAX_NODES} values", node)
    return sizes[id(node)]


def take_as_written(node: yaml.Node, key: str, text_keys: Collection[str], done: set[tuple[int, str]]) -> None:
    """Make text of scalars where text is wanted, and of every key; refuse what a config cannot hold.

    Raises ConstructorError.
    """
    if (id(node), key) in done:
        return
    done.add((id(node), key))
    if node.tag == MERGE_TAG and key in text_keys:
        node.tag = STR_TAG
    if node.tag not in PLAIN_TAGS:
        raise wrong(f"tag {node.tag.replace('tag:yaml.org,2002:', '!!')} is not for a config", node)
    if isinstance(node, yaml.ScalarNode):
        check_characters(node)
        if key in text_keys and node.style is None and node.tag != NULL_TAG:
            refuse_cut_template(node)
            node.tag = STR_TAG
        elif PLAIN_TAGS[node.tag] in ("int", "float") and MISREAD.fullmatch(node.value):
            raise wrong(f"{key}: {node.value} is not a decimal number: write one, or put a text in quotes", node)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            take_as_written(child, key, text_keys, done)
    else:
        take_mapping_as_written(node, key, text_keys, done)


def take_mapping_as_written(node: Any, key: str, text_keys: Collection[str], done: set[tuple[int, str]]) -> None:
    """`take_as_written` for a mapping; a key given twice, of which PyYAML silently keeps the last, is refused too."""
    seen: set[str] = set()
    for name, child in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise wrong("a key must be plain text", name)
        check_characters(name)
        if name.value in seen:
            raise wrong(f"key {name.value} is given twice", name)
        seen.add(name.value)
        if name.tag == MERGE_TAG:
            take_as_written(child, key, text_keys, done)
            continue
        name.tag = STR_TAG
        # The keys of a sweep are dotted themselves.
        below = name.value if key in ("", "sweep") else f"{key}.{name.value}"
        take_as_written(child, below, text_keys, done)


def refuse_cut_template(node: yaml.ScalarNode) -> None:
    """Raise ConstructorError for a template without quotes whose end is a comment: `Question #1: {{ text }}`."""
    end = node.end_mark
    rest = end.buffer[end.pointer :].splitlines()[:1] if end.buffer else []
    if any("#" in line and ("{{" in line or "{%" in line) for line in rest):
        raise wrong("what follows # is a comment: put the template in quotes", node)


def check_characters(node: yaml.ScalarNode) -> None:
    """Raise ConstructorError for a text that no file name, terminal or tokenizer takes.

    The two halves of a surrogate pair, which is how JSON escapes an emoji, become the character they stand for.
    """
    node.value = PAIR.sub(lambda found: found[0].encode("utf-16", "surrogatepass").decode("utf-16"), node.value)
    if "\0" in node.value or any("\ud800" <= letter <= "\udfff" for letter in node.value):
        raise wrong("a text with a NUL or half a surrogate pair", node)


def wrong(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def one_line(error: object) -> str:
    return " ".join(str(error).split())


def describe_yaml_error(error: yaml.YAMLError, path: str | Path, text: str) -> str:
    """File, line, what is wrong, and what to do about a template without quotes, or about a tab."""
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark else ""
    problem = one_line(getattr(error, "problem", None) or error)
    if "found another document" in problem:
        problem = "a second document begins here (---), and a config is one"
    hint = ""
    if mark and "in quotes" not in problem and has_bare_template(text, mark.line):
        hint = '; put a template in quotes: "{{ column }}"'
    elif "'\\t'" in problem:
        hint = "; indent with spaces, not tabs"
    return f"{path}{line}: not valid YAML: {problem}{hint}"


def has_bare_template(text: str, line: int) -> bool:
    """Whether the line, from 0, or the one before has a value that begins with {{ without quotes: a mapping to YAML."""
    lines = text.splitlines()[max(line - 1, 0) : line + 1]
    return any(BARE_TEMPLATE.search(QUOTED.sub("", found)) for found in lines)


def apply_override(raw: dict[str, Any], override: str, text_keys: Collection[str] = ()) -> None:
    """Set `key.path=value` in place; the value is YAML, so numbers, lists and null work."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"command line: {override!r} is not key.path=value")
    max_split = 1 if key.startswith("sweep.") else -1  # the keys of a sweep are dotted themselves
    *parents, leaf = key.split(".", max_split)
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"command line: {key}: {parent} is a value, not a section")
        node = child
    node[leaf] = parse_value(value, key, text_keys)


def parse_value(text: str, key: str, text_keys: Collection[str]) -> Any:
    """The value in a word of the command line. Raises UserError.

    Under a key of free text it is the word itself, with its spaces, line breaks and `#`, unless it is null, quoted, or
    a list or a mapping of YAML. Under any other key, and for the members of a sweep, it is YAML.
    """
    is_text = key in text_keys  # a sweep's values are lists
    key = key.removeprefix("sweep.")
    if is_text and text not in NULLS and text.lstrip()[:1] not in tuple("\"'[{"):
        return check_text(text, key)
    try:
        value = load_text(text, text_keys, key)
    except yaml.constructor.ConstructorError as error:
        if text.lstrip()[:1] in ("{", "[") and BARE_TEMPLATE.match(text.lstrip()):
            return check_text(text, key)
        raise UserError(f"command line: {key}: {drop_key(one_line(error.problem), key)}") from None
    except yaml.YAMLError:
        return check_text(text, key)
    except RecursionError:
        raise UserError(f"command line: {key}: nested too deeply") from None
    except MISFITS as error:
        raise UserError(f"command line: {key}: {one_line(error)}") from None
    is_quoted = text.strip()[:1] in tuple("\"'") and text.strip()[-1:] == text.strip()[:1]
    return check_text(text, key) if is_text and isinstance(value, str) and not is_quoted else value


def check_text(text: str, key: str) -> str:
    """A word of the command line as it is. Raises UserError for bytes that are not UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"command line: {key}: not UTF-8 text")
    return text


def drop_key(message: str, key: str) -> str:
    return message.removeprefix(f"{key}: ")
