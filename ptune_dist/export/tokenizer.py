"""A tokenizer and a chat template that put a prompt's tokens where they were trained, by themselves or by name."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerBase

from ptune_dist.data.framing import special_ids
from ptune_dist.errors import UserError
from ptune_dist.export.token_prompts import TokenPrompt

PROBE = "A fine film."
ROLE = "prompt"  # of a message that names a prompt
SIMPLE = re.compile(r"([^{}]*)\{\{\s*\w+\s*\}\}([^{}]*)")  # a text with one column
BLANK = "\n\n"
END = "{{ '' }}"  # template text that follows a statement loses its line break; what follows an expression keeps it


def backend_of(tokenizer: PreTrainedTokenizerBase, path: str) -> Tokenizer:
    """Raises UserError for a tokenizer that is not one of the library `tokenizers`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"--to model: the tokenizer of {path} has no tokenizer.json, which prompts are added to")
    return cast(Tokenizer, backend)


def put_by_itself(tokenizer: PreTrainedTokenizerBase, prompt: TokenPrompt, *, ends: bool, path: str) -> None:
    """Have the tokenizer put the prompt around every text, and the chat template around every conversation.

    `ends`: an input ends as the tokenizer ends a text. The prompt comes before a BOS, or under infix last of all.
    """
    backend = backend_of(tokenizer, path)
    start, end = special_ids(tokenizer)
    is_last = prompt.trained.placement == "infix"
    before = backend.post_processor
    if end and not ends:
        before = begin_with(tokenizer, start)
    name = prompt.name_token
    kind = max(backend.encode("a", "a").type_ids, default=0)  # of a pair's second text
    around = processors.TemplateProcessing(
        single=f"$A {name}" if is_last else f"{name} $A",
        pair=f"$A $B:{kind} {name}" if is_last else f"{name} $A $B:{kind}",
        special_tokens=[cast(Any, {"id": name, "ids": prompt.ids, "tokens": prompt.tokens})],
    )
    backend.post_processor = around if before is None else processors.Sequence([before, around])
    text = quote(prompt.text)
    if is_last:
        change_chat(tokenizer, after=f"{{% if add_generation_prompt %}}{{{{ {text} }}}}{{% endif %}}")
    else:
        change_chat(tokenizer, before=f"{{{{ {text} }}}}")


def begin_with(tokenizer: PreTrainedTokenizerBase, start: list[int], end: Sequence[int] = ()) -> Any:
    """What puts special tokens around a text."""
    pieces = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in [*start, *end]}
    single = " ".join([*(pieces[i] for i in start), "$A", *(pieces[i] for i in end)])
    return processors.TemplateProcessing(single=single, special_tokens=[(piece, i) for i, piece in pieces.items()])


def put_by_name(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenPrompt], path: str
) -> tuple[dict[str, str], list[int]]:
    """Have texts name prompts: `<|NAME|>` becomes a prompt's tokens; a chat names one by its variable `prompt`.

    Returns the text that each stands for, and tokens of it that the tokenizer must look for in normalized text. A
    tokenizer that begins texts with a BOS begins none any more where prompts precede it: their names do. Raises
    UserError.
    """
    backend = backend_of(tokenizer, path)
    start, end = special_ids(tokenizer)
    are_first = {prompt.trained.placement in ("prefix", "encoder") for prompt in prompts}
    lead = ""
    if start and len(are_first) > 1:
        raise UserError(
            f"--to model: the tokenizer of {path} begins texts with {tokenizer.convert_ids_to_tokens(start[0])}, which "
            "prompts of placement prefix precede and others follow: export them apart"
        )
    if start and True in are_first:
        lead = "".join(str(tokenizer.convert_ids_to_tokens(i)) for i in start)
        backend.post_processor = begin_with(tokenizer, [], end)
    wanted = {
        prompt.trained.name: prompt.ids + (start if lead else []) + plain_ids(tokenizer, PROBE) for prompt in prompts
    }
    texts = {prompt.trained.name: prompt.text + lead for prompt in prompts}
    before = backend.normalizer
    replacing = [normalizers.Replace(prompt.name_token, texts[prompt.trained.name]) for prompt in prompts]
    backend.normalizer = normalizers.Sequence([*replacing, *([] if before is None else [before])])
    late = start if lead else []
    written = Tokenizer.from_str(render_backend(tokenizer, late))
    for prompt in prompts:
        name = prompt.trained.name
        asked = [text + PROBE for text in (prompt.name_token, texts[name])]
        if any(written.encode(text, add_special_tokens=False).ids != wanted[name] for text in asked):
            raise UserError(
                f"--to model: the tokenizer of {path} splits a text otherwise once a prompt precedes it, so a prompt "
                "cannot be named in it: export one run alone, without --by-name"
            )
    name_in_chat(tokenizer, prompts)
    return texts, late


def render_backend(tokenizer: PreTrainedTokenizerBase, late: Sequence[int]) -> str:
    """tokenizer.json, with the tokens `late` looked for in the text that a normalizer leaves: it writes them."""
    content = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["normalized"] = token["normalized"] or token["id"] in late
    return json.dumps(content, ensure_ascii=False, indent=2)


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def name_in_chat(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenPrompt]) -> None:
    """Have chats choose a prompt: `apply_chat_template(messages, prompt=NAME)`, or a first message of role `prompt`."""
    first = {p.trained.name: p.text for p in prompts if p.trained.placement in ("prefix", "encoder")}
    last = {p.trained.name: p.text for p in prompts if p.trained.placement == "infix"}
    names = ", ".join(sorted(first | last))
    before = (
        f"{{% set prompts_before = {json.dumps(first)} %}}{{% set prompts_after = {json.dumps(last)} %}}"
        f"{{% if messages and messages[0]['role'] == '{ROLE}' %}}{{% set prompt = messages[0]['content'] %}}"
        "{% set messages = messages[1:] %}{% endif %}"
        "{% if prompt is defined and prompt %}{% if prompt not in prompts_before and prompt not in prompts_after %}"
        f"{{{{ raise_exception({quote(f'prompt is none of {names}')}) }}}}{{% endif %}}"
        "{{ prompts_before.get(prompt, '') }}{% endif %}" + END
    )
    after = (
        "{% if add_generation_prompt and prompt is defined and prompt %}{{ prompts_after.get(prompt, '') }}{% endif %}"
    )
    change_chat(tokenizer, before=before, after=after if last else "")


def change_chat(tokenizer: PreTrainedTokenizerBase, *, before: str = "", after: str = "") -> None:
    """Put template text around the chat template, or around each of several; a base without one gets none."""
    template = cast(Any, tokenizer.chat_template)
    if isinstance(template, dict):
        tokenizer.chat_template = cast(Any, {name: before + each + after for name, each in template.items()})
    elif template:
        tokenizer.chat_template = before + template + after


def set_system(tokenizer: PreTrainedTokenizerBase, system: str | None, text: str) -> None:
    """Have conversations begin as a run had them: `system` where there is no system prompt, then `text` at its end."""
    has_none = "{% if not messages or messages[0]['role'] != 'system' %}"
    begin = "{{% set messages = [{{'role': 'system', 'content': {}}}] + messages{} %}}".format
    before = ""
    if system is not None:
        before += f"{has_none}{begin(quote(system), '')}{{% endif %}}"
    if text:
        longer = f"messages[0]['content'].rstrip() + {quote(f'{BLANK}{text}')}"
        before += f"{has_none}{begin(quote(text), '')}{{% else %}}{begin(longer, '[1:]')}{{% endif %}}"
    if before:
        change_chat(tokenizer, before=before + END)


def chat_as_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Give a base without a chat template one that writes the last message as `data.template` writes a row.

    Of a template with a single column and nothing else of Jinja; others are left alone.
    """
    simple = SIMPLE.fullmatch(template or "")
    if tokenizer.chat_template or simple is None:
        return
    start = "".join(str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer)[0])
    before, after = simple.groups()
    tokenizer.chat_template = f"{{{{ {quote(start + before)} + messages[-1]['content'] + {quote(after)} }}}}"


def quote(text: str) -> str:
    """A text as a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, late: Sequence[int], out: Path) -> None:
    """Write a tokenizer whose class takes tokenizer.json as it is: many others make their own of its vocabulary.

    `late` as for `render_backend`.
    """
    tokenizer.save_pretrained(out)
    if late:
        (out / "tokenizer.json").write_text(render_backend(tokenizer, late) + "\n")
    file = out / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for key in ("add_bos_token", "add_eos_token", "local_files_only", "is_local", "tokenizer_file", "backend"):
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
