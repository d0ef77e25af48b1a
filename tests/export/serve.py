"""Answer texts with a folder as any server does: transformers alone, without this package.

Usage: serve.py REQUESTS ANSWERS. Requests are lines of JSON: {"model", "texts", "new_tokens"}; answers are lists.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, pipeline


def answer(request: dict[str, Any]) -> list[str]:
    folder = request["model"]
    of_encoder_decoder = AutoConfig.from_pretrained(folder).is_encoder_decoder
    if of_encoder_decoder:  # which pipelines no longer have
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = []
        for text in request["texts"]:
            made = model.generate(
                **tokenizer(text, return_tensors="pt"), max_new_tokens=request["new_tokens"], do_sample=False
            )
            found.append(tokenizer.decode(made[0], skip_special_tokens=True).strip())
        return found
    generate = pipeline("text-generation", model=folder, device="cpu")
    options = {"max_new_tokens": request["new_tokens"], "do_sample": False, "return_full_text": False}
    return [generate(text, **options)[0]["generated_text"].strip() for text in request["texts"]]


def main() -> None:
    requests, answers = map(Path, sys.argv[1:])
    torch.manual_seed(0)
    found = [answer(json.loads(line)) for line in requests.read_text().splitlines()]
    assert not any(name.partition(".")[0] in ("ptune_dist", "deepspeed") for name in sys.modules)
    answers.write_text("".join(json.dumps(each) + "\n" for each in found))


if __name__ == "__main__":
    main()
