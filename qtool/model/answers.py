"""Answers of an original model to lm-eval's requests, kept by the requests' text, so that the next recipe asks it nothing."""

import functools
import hashlib
import json
from typing import Any

import torch

from qtool.model.handle import ModelHandle
from qtool.model.kept import pack_text, unpack_text

ANSWERS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def recall_answers(lm: Any, model: ModelHandle) -> None:
    """Let an lm-eval model take up the answers that an earlier run kept of this model, to the same requests; it keeps those it
    gives. Of processes that share the requests all take up theirs, or none does: they wait for each other while they ask.
    """
    if (kept := model.kept) is None:
        return

    def recalled(kind: str, compute: Any, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        asked = json.dumps([kind, [request.args for request in requests], lm.batch_size], default=str)
        key = model.kept_key("lm-eval's answers", hashlib.sha256(asked.encode()).hexdigest())
        stored = None if '"do_sample": true' in asked else kept.read(key)
        found = lm.all_gather(torch.tensor([int(stored is not None)], device=lm.device))  # [processes]
        if stored is not None and bool(found.all()):
            return [tuple(one) if isinstance(one, list) else one for one in json.loads(unpack_text(stored))]
        answers = compute(requests, disable_tqdm=disable_tqdm)
        kept.write(key, pack_text(json.dumps(answers)))
        return list(answers)

    for kind in ANSWERS:
        setattr(lm, kind, functools.partial(recalled, kind, getattr(lm, kind)))
