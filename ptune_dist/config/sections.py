"""The sections `model`, `prompt` and `data.csv`: every key with its type, default and meaning."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from ptune_dist.config.fields import (
    AutoOrOff,
    Label,
    NotNegative,
    PathText,
    Real,
    Section,
    at_most,
    read_header,
    refuse_twice,
)
from ptune_dist.config.prompt_text import JINJA, Around, TextConfig


class ModelConfig(Section):
    """The frozen base model."""

    path: PathText
    """A local folder or a name on the Hugging Face hub: a transformers model in safetensors files. Or one of the tiny
    bases that come with the package: `tiny-causal`, `tiny-gpt2`, `tiny-llama`, `tiny-t5`, `tiny-bert`."""

    revision: str | None = None
    """A commit, tag or branch of the base on the hub: a commit pins it. The hub's `main` where left out."""

    family: str = "auto"
    """How the base reads an example; `auto` takes it from the base's own config."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of the computation. DeepSpeed's `bf16` and `fp16` sections follow it; `float16` needs a GPU."""

    quantization: Literal["none", "int8", "fp8"] = "none"
    """`int8` and `fp8` store the weights of the frozen linear layers in 8 bits. `fp8` multiplies in 8 bits too, forward
    and back, which is faster and coarser: on GPUs of compute capability 8.9 or newer, emulated on a CPU."""

    int8_include: list[Literal["head", "embeddings"]] = []
    """Also stored in int8: the output head, the token embeddings."""

    int8_activations: bool = False
    """Multiply in int8 too, as LLM.int8() does: faster on some devices, coarser on all of them."""

    int8_threshold: Annotated[Real, Field(ge=0)] = 6.0
    """With `int8_activations`: input columns with an entry beyond it stay in floating point."""

    compile: AutoOrOff = "auto"
    """`auto` compiles norms, rotary embeddings and gated activations to fused kernels on a GPU; what cannot be compiled
    runs one operation at a time, after a line that says why. `off` compiles none."""

    check: bool = True
    """Before training, compare two rows in our pass with the base's own forward: a base whose architecture needs
    more than it is given is refused. `false` trains on it as it is."""

    random_init: bool = False
    """Build the base from its shape with random weights, for benchmarks without a download."""

    @model_validator(mode="after")
    def check_int8(self) -> "ModelConfig":
        for key, formats in {"int8_include": ["int8", "fp8"], "int8_activations": ["int8"]}.items():
            if getattr(self, key) and self.quantization not in formats:
                found = f"model.{key} is given but model.quantization is {self.quantization}"
                raise ValueError(f"{found}: set it to {' or '.join(formats)}")
        return self


def check_files(files: str | list[str]) -> str | list[str]:
    return files if isinstance(files, str) else refuse_twice(files)


class PromptConfig(Section):
    """The soft prompt: how it is parameterized, where it is placed and how it starts.

    The options of a method are keys of this section too. They are kept as they are given: which of them a method has
    is checked by the `resolve` of `load_config`.
    """

    model_config = ConfigDict(extra="allow")

    method: str = "prompt_tuning"
    """How the prompt is parameterized. Some methods have options of their own, which are listed with the method."""

    num_virtual_tokens: Annotated[NotNegative, at_most(100_000)] = 20
    """The length of the prompt in positions; 0 of methods that take none."""

    placement: Literal["prefix", "infix", "template", "encoder", "decoder", "both"] = "prefix"
    """Where the virtual tokens stand. `prefix`: before the input. `infix`: between input and target. `template`: where
    `{{ prompt }}` stands in `data.template`. `encoder`, `decoder`: before what that half of a seq2seq base reads.
    `both`: keys and values of both halves and of the attention between them, which is what `prefix` means for
    `prefix_tuning` on a seq2seq base."""

    init: Literal["random", "vocab", "text", "labels", "file", "rows", "zero", "base"] | None = None
    """What the prompt starts from; where left out, what suits the method. `random`: random numbers. `vocab`: embeddings
    of random tokens. `text`, `labels`: embeddings of a text or of the labels. `file`: an earlier prompt. With
    `prefix_tuning`, `text` and `rows`: keys and values of a text or of training rows; `zero`: zeros. `base`: the base's
    own tensors, of methods that train some of them."""

    init_text: str | None = None
    """The text to start from, with `init: text`, which is the default where a text is given."""

    text: TextConfig | None = None
    """A written prompt around `data.template`, which the base reads beside the virtual tokens. With `init: text` and no
    `init_text` the virtual tokens start from what stands before the template, and take its place."""

    init_labels: list[Label] | None = None
    """The labels to start from, with `init: labels`; `data.labels` where left out."""

    init_file: Annotated[PathText | list[PathText], AfterValidator(check_files)] | None = None
    """The run, prompt folder or PEFT adapter to start from, with `init: file`, perhaps of another task. Of several the
    one with the least loss on the first rows is taken."""

    @model_validator(mode="after")
    def check_init(self) -> "PromptConfig":
        for kind in ("text", "file"):
            given = getattr(self, f"init_{kind}")
            if self.init == kind and not given and not (kind == "text" and self.text):
                raise ValueError(f"prompt.init: {kind} needs prompt.init_{kind}")
            if given and self.init != kind and not (kind == "text" and self.init is None):
                raise ValueError(f"prompt.init_{kind} is given but prompt.init is {self.init}: set prompt.init={kind}")
        if self.init_labels and self.init != "labels":
            raise ValueError(f"prompt.init_labels is given but prompt.init is {self.init}: set prompt.init=labels")
        if self.replaces_text:
            self.check_start_text()
        return self

    def check_start_text(self) -> None:
        """Raises ValueError for a written prompt that virtual tokens cannot start from."""
        assert self.text is not None
        before = self.text.around().before
        if not any(text.strip() for _, text in before):
            raise ValueError("prompt.init: text needs a text before data.template in prompt.text, or prompt.init_text")
        for key, text in before:
            if JINJA.search(text):
                raise ValueError(
                    f"{key}: with prompt.init=text the virtual tokens start from it, and they know no columns: give "
                    "prompt.init_text too"
                )

    @property
    def replaces_text(self) -> bool:
        """Whether the virtual tokens start from `text` and take the place of what stands before the template."""
        return self.init == "text" and self.init_text is None and self.text is not None

    @property
    def around(self) -> Around:
        """The texts that the base reads around `data.template`."""
        if self.text is None:
            return Around()
        found = self.text.around()
        return Around(after=found.after, joins=found.joins) if self.replaces_text else found

    @property
    def start_text(self) -> str | None:
        """The text that the virtual tokens start from, with `init: text`."""
        return self.text.around().head().rstrip(" ") if self.text and self.replaces_text else self.init_text


class TaskFiles(Section):
    """The rows of one task, in the forms of `data.train`."""

    train: str
    """The training rows."""

    validation: str | None = None
    """The validation rows."""


class CsvConfig(Section):
    """How .csv and .tsv files are written, where it is not as usual for their extension."""

    delimiter: str | None = None
    """The character between fields: `,` in .csv and a tab in .tsv where left out."""

    quoting: Literal["minimal", "all", "none"] | None = None
    """`minimal`, `all`: a field may stand in quotes, which are removed. `none`: quotes are plain characters. Where left
    out, `minimal` in .csv and `none` in .tsv, and quotes that look otherwise are an error."""

    quotechar: str = '"'
    """The quote."""

    escapechar: str | None = None
    """A character that makes the next one plain, such as a backslash."""

    doublequote: bool = True
    """Whether two quotes inside a quoted field are one."""

    skipinitialspace: bool | None = None
    """Whether spaces after a separator are skipped, so that a quote may follow them. Where left out they are kept, and
    a quote after one is an error."""

    encoding: str | None = None
    """The encoding, such as `latin-1`, `cp1252` or `utf-16`: UTF-8 where left out."""

    header: Annotated[bool | list[str] | None, BeforeValidator(read_header)] = None
    """The columns' names, where the first line is a row already. `true`: the first line is the header even if it looks
    like a row."""

    @model_validator(mode="after")
    def check_characters(self) -> "CsvConfig":
        for name in ("delimiter", "quotechar", "escapechar"):
            value = getattr(self, name)
            if value is not None and (len(value) != 1 or value in "\r\n"):
                raise ValueError(f"data.csv.{name}: one character is needed, not {value!r}")
        if self.delimiter == self.quotechar and self.quoting != "none":
            raise ValueError(f"data.csv.delimiter and data.csv.quotechar are both {self.delimiter!r}")
        try:
            b"a".decode(self.encoding or "utf-8")  # nothing is looked up for an empty text
        except LookupError:
            raise ValueError(f"data.csv.encoding: Python knows no text encoding {self.encoding!r}") from None
        except UnicodeDecodeError:  # one letter is half a character in UTF-16
            pass
        except ValueError as error:
            raise ValueError(f"data.csv.encoding: {error}") from None
        return self
