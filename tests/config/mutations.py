"""Seeded mutations of the text of configs: what people and editors do to them, and what nobody does."""

import random

VALUES = (
    r"""
yes no on off true null ~ .inf -.inf .nan 010 0x10 1_000 12:30 1e400 1e-3 2024-01-01 99999999999999999999999 -1 0 ''
"" .5 [] {} [1,2] {{text}} {%x%} !!python/object:os.system !!set {a} &a [*a] *b << = ? | > @x `x` %x "\ud800" "\0"
"\x07" auto [[[[]]]] . .. / ~/ 1.50 - -- # : :: !!float !!int !!bool !!timestamp !!null !x [1 "unclosed 'unclosed
""".split()
    + [
        "{a: b}",
        "{{ text }}",
        "!!binary aGk=",
        "!!bool x",
        "!!int x",
        "{zero_optimization: {stage: 7}}",
        "{train.learning_rate: [x]}",
        "x" * 5000,
        "[" * 300,
        "{a: " * 300,
        "é\u2028ü",
        "\t",
    ]
)
INSERTS = ["\t", "\0", "\x1b", "\r", "\n", "---\n", "...\n", "\ufeff", "\u2028", *":{}[],'#|?%", '"', "- ", "&a ", "*a"]
JSON_VALUES = (
    r"""
null true false -1 0 1e400 NaN Infinity "auto" "" "x" [] {} [1] {"a":1} 99999999999999999999999 1.5 {"enabled":"auto"}
"\ud800" "\u0000"
""".split()
    + ["[" * 3000]
)


def mutate_yaml(text: str, seed: int) -> bytes:
    """The text after one to four mutations."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        text = mutate_lines(text, rng) if rng.random() < 0.7 else mutate_letters(text, rng)
    content = text.encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.03:
        return rng.choice([b"\xef\xbb\xbf" + content, text.encode("utf-16"), b"\xff" + content])
    return content.replace(b"\n", b"\r\n") if kind < 0.06 else content


def mutate_lines(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    number = rng.randrange(len(lines))
    line = lines[number]
    key, colon, value = line.partition(":")
    way = rng.randrange(8)
    if way <= 2 and colon:
        lines[number] = f"{key}: {rng.choice(VALUES)}"
    elif way == 3:
        lines.insert(number, line)
    elif way == 4:
        lines[number] = rng.choice(["", " ", "  ", "\t"]) + line.lstrip()
    elif way == 5 and colon:
        lines[number] = f"{key[: len(key) // 2]}{rng.choice(VALUES)}:{value}"
    elif way == 6:
        lines[number : number + rng.randint(1, 3)] = []
    else:
        lines.insert(number, f"{rng.choice(VALUES)}: {rng.choice(VALUES)}")
    return "\n".join(lines)


def mutate_letters(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    if rng.random() < 0.5:
        return text[:at] + rng.choice(INSERTS) + text[at:]
    return text[:at] + text[at + rng.randint(1, 5) :]


def mutate_json(text: str, seed: int) -> str:
    """A DeepSpeed JSON after one to three mutations, most of which leave it JSON."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        number = rng.randrange(len(lines))
        key, colon, value = lines[number].partition(":")
        if colon and rng.random() < 0.8:
            rest = ', "x": {' if value.endswith("{") else "," if value.endswith(",") else ""
            lines[number] = f"{key}: {rng.choice(JSON_VALUES)}{rest}"
        elif rng.random() < 0.7:
            lines.insert(number, rng.choice(lines))
        else:
            lines[number] = mutate_letters(lines[number], rng)
        text = "\n".join(lines)
    return text
