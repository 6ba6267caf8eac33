"""One model through lm-eval: open it, run the tasks, halve the batch when memory runs out, keep finished requests."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from wpmerge.capability import rendering
from wpmerge.directory import locate
from wpmerge.errors import CheckpointError, EvaluationError, ran_out_of_memory, reason_of
from wpmerge.loading import check_weights as check_stored_weights
from wpmerge.loading import loading, where_from
from wpmerge.tasks import TaskSuite, quiet
from wpmerge.tensorfile import check_finite

Loaded: TypeAlias = tuple[Any, Any]
"""A transformers model and its tokenizer."""

Model: TypeAlias = str | Path | Loaded | Callable[[], Loaded]
"""A local directory, a hub id, a loaded pair, or a function that loads one when its turn comes."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the requests done and their total."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """A function that loads one, and the directories that it reads.

    Attributes:
        load: the function.
        inputs: the directories; no output may take the place of one.
    """

    load: Callable[[], Loaded]
    inputs: tuple[Path, ...]

    def __call__(self) -> Loaded:
        return self.load()


_REQUESTS = ("generate_until", "loglikelihood", "loglikelihood_rolling")
_DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a task names none
_SEEDS = 2**32  # numpy takes no others
_CHAT_BACKENDS = ("anthropic-chat", "litellm", "litellm-chat")
"""Those of lm-eval 0.4.13's chat backends whose names do not end in -chat-completions."""
SERVED = "server"
"""Stands for the chat template of a server."""
_SEEDED = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
_SET_ELSEWHERE: Mapping[str, str] = {
    "pretrained": "name the model itself, as NAME=PATH",
    "batch_size": "use --batch-size",
    "device": "use --device",
}
"""Arguments of every model class that are set here, and how a user sets them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessSettings:
    """How every model of an evaluation is run.

    Attributes:
        backend: lm-eval's name of a model class; ``hf`` runs transformers.
        model_args: further arguments of that class.
        batch_size: prompts run together, which decides roundings too; also lm-eval's ``auto``.
        max_gen_tokens: upper bound of new tokens a response; None leaves each task's own.
        limit: first documents of each task; None is all.
        device: torch device for models read from disk; None is CUDA where there is one, else the CPU.
        dtype: weights' dtype for models read from disk, the backend's argument ``dtype``; ``auto`` is the checkpoint's
            for ``hf``, and for other backends their own default.
        chat_template: None uses the tokenizer's template where it has one, and leaves it to the server under lm-eval's
            chat-completions backends.
        seed: of everything that lm-eval draws, in [0, 2³²); None is lm-eval's own: 0 for Python, 1234 for the rest.
        unsafe_code: tasks may run code that the model wrote.

    Raises:
        EvaluationError: an argument that has an option of its own, or a seed out of range.
    """

    backend: str = "hf"
    model_args: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | str = 16
    max_gen_tokens: int | None = None
    limit: int | None = None
    device: str | None = None
    dtype: str = "auto"
    chat_template: bool | None = None
    seed: int | None = None
    unsafe_code: bool = False

    def __post_init__(self) -> None:
        if taken := [name for name in _SET_ELSEWHERE if name in self.model_args]:
            raise EvaluationError(
                "--model-arg gives what is set elsewhere",
                got=f"{taken[0]}={self.model_args[taken[0]]}",
                expected="an argument that no option sets",
                mend=_SET_ELSEWHERE[taken[0]],
            )
        if self.seed is not None and (not isinstance(self.seed, int) or not 0 <= self.seed < _SEEDS):
            raise EvaluationError(
                "seed is out of range", got=repr(self.seed), expected=f"a whole number from 0 to {_SEEDS - 1}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRun:
    """What lm-eval returned for one model.

    Attributes:
        results: lm-eval's results, without samples.
        samples: task to lm-eval's log of each document.
        chat_template: SHA-256 of the template that was applied, or :data:`SERVED`; None when none was.
        batch_size: the one that fitted.
        truncated: prompts cut from the left to leave room for the response.
    """

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    chat_template: str | None
    batch_size: int | str
    truncated: int


def run_model(
    name: str,
    model: Model,
    suite: TaskSuite,
    settings: HarnessSettings,
    *,
    cache: Path,
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> ModelRun:
    """Evaluate one model on loaded tasks.

    Args:
        name: what messages call the model.
        model: see :data:`Model`; a loaded model stays on its device.
        suite: the tasks.
        settings: how to run it.
        cache: file name of lm-eval's cache of finished requests; a rerun answers from it.
        say: takes one-sentence messages.
        progress: see :data:`Progress`.

    Raises:
        EvaluationError: the model cannot be loaded, has weights that are not finite or a chat template that fails, has
            no room for the response, does not fit at batch size 1, or fails with the arguments it is given.
    """
    with quiet(), _given_arguments(name, settings):
        lm = _open(name, model, settings)
        _check_finite(name, model, lm)
        _check_room(name, lm, suite, settings)
        if progress is not None:
            _count_requests(lm, progress)
        served = _templates_at_server(settings)
        template = _template(lm) if settings.chat_template is not False and not served else None
        if template is None and settings.chat_template and not served:
            raise EvaluationError(
                "a chat template is asked for, and the tokenizer has none", where=name, mend="leave the option out"
            )
        if template is not None:
            _try_template(where_from(name, model), lm, settings)
        cached = _caching(lm, cache, progress)
        try:
            results = _run_halving(name, lm, cached, suite, settings, template is not None or served, say)
        finally:
            cached.dbdict.close()
        samples = results.pop("samples")
        truncated = _truncated(lm, suite, samples)
    return ModelRun(
        results=results,
        samples=samples,
        chat_template=SERVED if served else hashlib.sha256(template.encode()).hexdigest() if template else None,
        batch_size=getattr(lm, "batch_size", settings.batch_size),
        truncated=truncated,
    )


@contextmanager
def _given_arguments(name: str, settings: HarnessSettings) -> Iterator[None]:
    """Say that a model fails with the arguments that a user gave it; without any, what is raised passes unchanged.

    Raises:
        EvaluationError: names the arguments.
    """
    given = [argument for argument in settings.model_args if argument != "trust_remote_code"]  # has its own option
    try:
        yield
    except (TypeError, ValueError, AssertionError, OverflowError, RuntimeError) as error:
        if not given or ran_out_of_memory(error):
            raise
        raise EvaluationError(
            "a model fails with the arguments that it is given",
            where=name,
            got=reason_of(error),
            expected=f"what lm-eval's {settings.backend!r} model class takes as {', '.join(given)}",
            mend="check each --model-arg, or leave them out",
        ) from error


def _open(name: str, model: Model, settings: HarnessSettings) -> Any:
    """lm-eval's object for a model."""
    from lm_eval.api.registry import get_model
    from lm_eval.models.huggingface import HFLM

    with loading(name, model, settings.backend):
        if callable(model):
            model = model()
        if isinstance(model, tuple):
            network, tokenizer = model
            return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=settings.batch_size, **settings.model_args)
        device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        arguments = {"pretrained": str(open_source(name, model, settings)), **settings.model_args}
        if settings.backend == "hf" or settings.dtype != "auto":  # not every backend knows auto
            arguments.setdefault("dtype", settings.dtype)
        return get_model(settings.backend).create_from_arg_obj(
            arguments, {"batch_size": settings.batch_size, "max_batch_size": None, "device": device}
        )


def _check_finite(name: str, model: Model, lm: Any) -> None:
    """Refuse NaN and infinity among a transformers model's weights, tensor by tensor: its replies would be noise, and
    its scores 0.

    Raises:
        EvaluationError: names the first tensor that has one.
    """
    network = getattr(lm, "model", None)
    if not isinstance(network, torch.nn.Module):
        return
    where = where_from(name, model)
    for key, weights in network.named_parameters():
        if type(weights.data) is not torch.Tensor or weights.is_meta or weights.itemsize == 1:
            continue  # sharded, offloaded or quantised
        try:
            check_finite(weights.detach(), where=f"{key} in {where}")
        except CheckpointError as error:
            raise EvaluationError(
                error.what,
                where=error.where,
                got=error.got,
                expected=error.expected,
                mend="use another copy of the checkpoint, or a wider --dtype if this one is too narrow for it",
            ) from None


def open_source(name: str, model: Model, settings: HarnessSettings) -> Model:
    """Where a model lies, before anything is run: a local directory that holds one; hub ids are fetched or found.

    Loaded models, functions that load one, and what other backends than ``hf`` find themselves pass unchanged.

    Raises:
        EvaluationError: a directory without a model.
        CheckpointError: neither a directory nor obtainable from the hub.
    """
    if not isinstance(model, str | Path) or settings.backend != "hf":
        return model
    folder = locate(str(model)).absolute()  # lm-eval would look a relative path up on the hub
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise EvaluationError(
            "a LoRA adapter alone is no model", where=f"{name}: {model}", mend="evaluate it merged into its base"
        )
    raise EvaluationError("a model is no checkpoint", where=f"{name}: {model}", expected="a config.json in it")


def check_weights(name: str, model: Model, settings: HarnessSettings) -> None:
    """Refuse a local directory whose tensors are not its model's; see :func:`wpmerge.loading.check_weights`.

    Loaded models, functions that load one, and what other backends than ``hf`` load pass.

    Raises:
        EvaluationError: names the tensor.
    """
    if settings.backend == "hf" and isinstance(model, Path):
        check_stored_weights(name, model, settings.model_args)


def model_identity(name: str, model: Model, settings: HarnessSettings) -> tuple[Model, dict[str, Any]]:
    """The model, loaded if it was a function, and what tells it from others: the names, sizes and times of the files of
    its directory and of those that its arguments name, or a hash of a loaded model's weights and its tokenizer.

    Raises:
        EvaluationError: it cannot be loaded.
    """
    beside = [value for value in settings.model_args.values() if isinstance(value, str)]
    identity: dict[str, Any] = {"beside": [_files(each) for each in beside if Path(each).is_dir()]}
    if callable(model):
        with loading(name, model, settings.backend):
            model = model()
    if not isinstance(model, tuple):
        found = _files(model) if Path(model).is_dir() else {"name": str(model)}
        return model, {**identity, **found}
    network, tokenizer = model
    digest = hashlib.sha256(str(network.config).encode() + repr(getattr(tokenizer, "chat_template", "")).encode())
    for key, tensor in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return model, {**identity, "sha256": digest.hexdigest()}


def _files(folder: str | Path) -> dict[str, Any]:
    """A directory and the names, sizes and times of the files in it."""
    path = Path(folder).resolve()
    files = {each.name: (each.stat().st_size, each.stat().st_mtime_ns) for each in path.iterdir() if each.is_file()}
    return {"path": str(path), "files": sorted(files.items())}


def _template(lm: Any) -> str | None:
    """The tokenizer's chat template as text, the tool-free one where there are several."""
    template = getattr(getattr(lm, "tokenizer", None), "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default", json.dumps(template, sort_keys=True))
    return template or None


def _templates_at_server(settings: HarnessSettings) -> bool:
    """Whether a backend sends messages: the server puts them through its template, which is not known here.

    Raises:
        EvaluationError: no template is asked for; such a backend cannot leave it out.
    """
    served = settings.backend.endswith("-chat-completions") or settings.backend in _CHAT_BACKENDS
    if served and settings.chat_template is False:
        raise EvaluationError(
            "a chat server puts every message through its template",
            got=f"--no-chat-template with backend {settings.backend}",
            mend="leave the option out, or take a backend that sends plain text, such as local-completions",
        )
    return served


def _try_template(where: str, lm: Any, settings: HarnessSettings) -> None:
    """Apply the chat template once, before any request, and see to it that one that fails later is named too.

    Raises:
        EvaluationError: it fails.
    """
    render: Callable[..., str] = lm.apply_chat_template
    beside = " or what --model-arg gives it" if settings.model_args else ""
    mend = f"correct the template{beside}, or leave it out with --no-chat-template"

    def call(*args: Any, **kwargs: Any) -> str:
        with rendering(where, kind=EvaluationError, mend=mend):
            return render(*args, **kwargs)

    lm.apply_chat_template = call
    call([{"role": "user", "content": "What is it?"}])


def _new_tokens(suite: TaskSuite, settings: HarnessSettings) -> int:
    """The longest response that any task asks for, in tokens; 0 where none generates."""
    generating = [task for task in suite.leaves.values() if task.OUTPUT_TYPE == "generate_until"]
    if settings.max_gen_tokens is not None:
        return settings.max_gen_tokens if generating else 0
    asked = [(task.config.generation_kwargs or {}).get("max_gen_toks", _DEFAULT_NEW_TOKENS) for task in generating]
    return max(asked, default=0)


def _check_room(name: str, lm: Any, suite: TaskSuite, settings: HarnessSettings) -> None:
    """Refuse a response length that leaves no room for a prompt; lm-eval would stop on an assertion."""
    window, new = getattr(lm, "max_length", None), _new_tokens(suite, settings)
    if isinstance(window, int) and new >= window:
        raise EvaluationError(
            "the response may be as long as the model's whole window.",
            where=name,
            got=f"{new} new tokens",
            expected=f"fewer than {window}",
            mend="lower --max-gen-tokens",
        )


def _truncated(lm: Any, suite: TaskSuite, samples: Mapping[str, list[dict[str, Any]]]) -> int:
    """How many prompts lm-eval had to cut; 0 for backends that keep their tokenizer to themselves."""
    if not hasattr(lm, "tok_encode") or not isinstance(getattr(lm, "max_length", None), int):
        return 0
    count = 0
    for task, logged in samples.items():
        if suite.leaves[task].OUTPUT_TYPE != "generate_until":
            continue
        room = lm.max_length - (suite.leaves[task].config.generation_kwargs or {}).get(
            "max_gen_toks", _DEFAULT_NEW_TOKENS
        )
        prompts = {sample["arguments"][0][0] for sample in logged}
        count += sum(len(lm.tok_encode(prompt)) > room for prompt in prompts)
    return count


def _caching(lm: Any, cache: Path, progress: Progress | None) -> Any:
    """The model behind lm-eval's cache of finished requests.

    Built here and not by ``simple_evaluate(use_cache=...)``, so that the database can be closed.
    """
    from lm_eval.api.model import LM, CachingLM

    logging.getLogger("sqlitedict").setLevel(logging.CRITICAL)  # it logs stack by stack what it raises as well
    LM.register(CachingLM)  # it stands in for one, and simple_evaluate asks
    cached = CachingLM(lm, str(cache))
    if progress is not None:
        lm.cache_hook.add_partial = _both(lm.cache_hook.add_partial, lm.wpmerge_tick)
    return cached


def _both(first: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        first(*args)
        then()

    return call


def _count_requests(lm: Any, progress: Progress) -> None:
    """Report each finished request: lm-eval tells its cache of it, whatever the backend."""
    state = {"done": 0, "total": 0}

    def tick() -> None:
        state["done"] = min(state["done"] + 1, state["total"])
        progress(state["done"], state["total"])

    def announced(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            state.update(done=0, total=len(requests))
            return run(requests, *args, **kwargs)

        return call

    for kind in _REQUESTS:
        setattr(lm, kind, announced(getattr(lm, kind)))
    lm.wpmerge_tick = tick


def _run_halving(
    name: str,
    lm: Any,
    cached: Any,
    suite: TaskSuite,
    settings: HarnessSettings,
    chat: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """lm-eval's ``simple_evaluate``; when memory runs out, again from the finished requests with half the batch."""
    while True:
        try:
            return _simple_evaluate(cached, suite, settings, chat)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            batch = getattr(lm, "batch_size_per_gpu", None)
            if not isinstance(batch, int) or batch <= 1:
                raise EvaluationError(
                    "memory ran out",
                    where=name,
                    got=f"batch size {batch}",
                    mend="fewer new tokens (--max-gen-tokens), another --device, or a backend that splits the model",
                ) from error
        lm.batch_size_per_gpu = batch // 2
        say(f"{name}: memory ran out at batch size {batch}; going on with {batch // 2}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _simple_evaluate(lm: Any, suite: TaskSuite, settings: HarnessSettings, chat: bool) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    generation = None if settings.max_gen_tokens is None else {"max_gen_toks": settings.max_gen_tokens}
    results: dict[str, Any] = simple_evaluate(
        model=lm,
        tasks=list(suite.loaded),
        task_manager=suite.manager,
        batch_size=settings.batch_size,
        limit=settings.limit,
        apply_chat_template=chat,
        gen_kwargs=generation,
        log_samples=True,
        bootstrap_iters=1000,
        **({} if settings.seed is None else dict.fromkeys(_SEEDED, settings.seed)),
        confirm_run_unsafe_code=settings.unsafe_code,
    )
    return results
