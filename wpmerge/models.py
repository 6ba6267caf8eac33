"""A base and its experts, opened, checked and ready to run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from wpmerge.arch import Layout, architecture_of
from wpmerge.capability import Chat
from wpmerge.checkpoint import Checkpoint, check_same_family, open_checkpoint
from wpmerge.directory import read_json
from wpmerge.engine import Engine, empty_model
from wpmerge.errors import CheckpointError
from wpmerge.memory import Budget, reply_per_token
from wpmerge.readouts import rows_run
from wpmerge.replies import Decoding, read_and_reply
from wpmerge.rows import pack
from wpmerge.vocabulary import Vocabulary, match_vocabulary
from wpmerge.weights import CheckpointWeights, WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A base and its experts.

    Attributes:
        base: the checkpoint that is merged into.
        experts: by name.
        layout: the units they share.
        engine: runs them.
        chat: the base's tokenizer and chat template.
        weights: each model's weights in the compute dtype, the base's under ``""``.
        resident: whether they stay in memory once read.
    """

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    layout: Layout
    engine: Engine
    chat: Chat
    weights: Mapping[str, WeightSource]
    resident: bool = True

    @property
    def stored_bytes(self) -> int:
        """Bytes per weight in the checkpoints, the most of any."""
        checkpoints = (self.base, *self.experts.values())
        return max(info.dtype.itemsize for checkpoint in checkpoints for info in checkpoint.tensors.values())


def open_family(
    base: str,
    experts: Mapping[str, str],
    *,
    device: str = "cpu",
    resident: bool = True,
    vocab: Vocabulary | None = None,
    trust_remote_code: bool = False,
) -> Family:
    """Open a base and its experts and refuse what cannot be compared.

    Args:
        base: a directory or a hub id.
        experts: name → directory, hub id or LoRA adapter.
        device: where to run, as torch names it.
        resident: keep weights in memory once read.
        vocab: what to do where vocabularies differ in size; see :func:`~wpmerge.vocabulary.match_vocabulary`.
        trust_remote_code: see :func:`~wpmerge.checkpoint.open_checkpoint`.

    Raises:
        CheckpointError: something cannot be read, is unsupported, differs in kind, or an expert is the base itself.
    """
    opened = open_checkpoint(base, trust_remote_code=trust_remote_code)
    architecture_of(opened.config)
    others = {
        name: open_checkpoint(source, base=opened, trust_remote_code=trust_remote_code)
        for name, source in experts.items()
    }
    matched = match_vocabulary({"": opened, **others}, "", vocab)
    opened, others = matched[""], {name: matched[name] for name in others}
    for name, expert in others.items():
        check_same_family(opened, expert, name=name)
        # the sampled hash is blind to a change in few places: only the full one says that there is none
        if expert.content_hash() == opened.content_hash() and _full_hash(expert) == _full_hash(opened):
            raise CheckpointError(
                f"expert {name} is the base itself: every gap would be 0",
                where=expert.path,
                mend="give the fine-tuned model",
            )
    layout = layout_of(opened)
    engine = Engine(layout, device=device)
    return Family(
        base=opened,
        experts=others,
        layout=layout,
        engine=engine,
        chat=Chat(load_tokenizer(opened.tokenizer_path)),
        weights=_weights(engine, {"": opened, **others}, resident=resident),
        resident=resident,
    )


def bounded(family: Family, allowed: Budget) -> Family:
    """The same models, with as much of weights and residual streams in memory as a bound on it allows."""
    engine = Engine(family.layout, device=family.engine.device, held_bytes=allowed.held_bytes)
    weights = _weights(engine, {"": family.base, **family.experts}, resident=allowed.resident)
    return replace(family, engine=engine, weights=weights, resident=allowed.resident)


def _weights(engine: Engine, checkpoints: Mapping[str, Checkpoint], *, resident: bool) -> dict[str, WeightSource]:
    return {
        name: CheckpointWeights(engine.layout, checkpoint, device=engine.device, resident=resident)
        for name, checkpoint in checkpoints.items()
    }


def _full_hash(checkpoint: Checkpoint) -> str:
    return checkpoint.content_hash(full=True)


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The units of a checkpoint."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return layout_from(checkpoint.config, shapes, where=checkpoint.path / "config.json")


def layout_from(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, where: object) -> Layout:
    """The units of a configuration and tensors; transformers fills in what a ``config.json`` leaves to defaults.

    Raises:
        CheckpointError: the configuration makes no model, or does not fit the tensors.
    """
    from transformers import AutoConfig

    settings = {key: value for key, value in config.items() if key != "model_type"}
    try:
        whole = AutoConfig.for_model(str(config["model_type"]), **settings).to_dict()
    except Exception as error:  # transformers raises many kinds for values that contradict each other
        raise CheckpointError(
            "the configuration makes no model",
            where=where,
            got=str(error).splitlines()[-1].strip(),
            mend="check that config.json belongs to these weights",
        ) from error
    return Layout(whole, shapes)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint directory.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            "the tokenizer cannot be read",
            where=path,
            got=str(error).splitlines()[0],
            mend="put tokenizer.json and tokenizer_config.json beside the weights",
        ) from error


def generation_model(engine: Engine, source: WeightSource) -> Any:
    """transformers' own causal LM with a source's weights, without copying them; for greedy continuations."""
    layout = engine.layout
    model: Any = empty_model(layout.config, device=engine.device)
    tensors = dict(source.outer())
    for index in range(layout.layers):
        prefix = layout.layer_prefix(index)
        tensors |= {prefix + name: value for name, value in source.layer(index).items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model


@torch.no_grad()
def continuations(family: Family, model: str, prompts: list[str], *, tokens: int) -> list[list[int]]:
    """A model's own greedy replies, token ids up to and with the end token, at most ``tokens`` each.

    Args:
        family: the models.
        model: an expert's name, or ``""`` for the base.
        prompts: as a user writes them.
        tokens: longest reply.
    """
    ends = end_tokens(family, model)
    sequences = [family.chat.prompt_tokens(prompt) for prompt in prompts]
    if not family.resident:
        return _streamed_continuations(family, family.weights[model], sequences, ends, tokens)
    tokenizer = family.chat.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    decoding = Decoding(longest=tokens, ends=frozenset(ends), pad=pad)
    if (held := family.engine.held_bytes) is not None:
        each = (max(map(len, sequences)) + tokens) * reply_per_token(family.layout)
        decoding = replace(decoding, batch_size=min(decoding.batch_size, max(1, held // each)))
    found = read_and_reply(
        generation_model(family.engine, family.weights[model]), sequences, [[] for _ in sequences], decoding
    )
    return [list(reply.tokens) for reply in found]


def _streamed_continuations(
    family: Family, source: WeightSource, sequences: list[list[int]], ends: set[int], tokens: int
) -> list[list[int]]:
    """The same with one layer's weights in memory: each token runs all unfinished prompts through the whole model."""
    engine, replies = family.engine, [list[int]() for _ in sequences]
    open_ = list(range(len(sequences)))
    for _ in range(tokens):
        rows = pack([sequences[number] + replies[number] for number in open_])
        outer = source.outer(family.layout.output_tensors())
        for row, hidden in rows_run(engine, source, rows, family.layout.layers - 1):
            last = torch.stack([place[-1] for place in row.places.values()]).to(hidden.device)
            chosen = engine.logits(outer, hidden[:, last])[0].argmax(dim=-1).tolist()
            for number, token in zip(row.places, chosen, strict=True):
                replies[open_[number]].append(token)
        open_ = [number for number in open_ if replies[number][-1] not in ends]
        if not open_:
            break
    return replies


def run_facts(family: Family, *, device: str) -> dict[str, Any]:
    """What decides what a family's models say and read, beside weights and prompts: as JSON, for fingerprints."""
    return {
        "config": family.base.config,
        "ends": [sorted(end_tokens(family, name)) for name in ("", *family.experts)],
        "pad": family.chat.tokenizer.pad_token_id,
        "device": device,
        "resident": family.resident,
    }


def end_tokens(family: Family, model: str) -> set[int]:
    """The tokens that end a reply: the tokenizer's, and those of the base's and the model's generation settings."""
    found = {family.chat.tokenizer.eos_token_id}
    for checkpoint in (family.base, family.experts.get(model, family.base)):
        path = checkpoint.path / "generation_config.json"
        stated = read_json(path).get("eos_token_id") if path.exists() else None
        found.update(stated if isinstance(stated, list) else [stated])
    return {token for token in found if isinstance(token, int)}
