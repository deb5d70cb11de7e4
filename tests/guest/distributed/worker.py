"""What each process of a distributed test does: train as its cases say, and leave what it saw as `<case>/seen-<rank>.pt`.

Every rank has an output folder of its own, as on machines that share no disk. Started by `launch.launch` under torchrun.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from sts_callback import PolicyConfig, ProbeConfig, STSCallback
from sts_callback.errors import CannotTell
from sts_callback.measure.monitor import Monitor
from sts_callback.runs.directory import RunDirectory
from tiny import rotated_sae, rows, tiny_arguments, tiny_model, tiny_tokenizer, tokenised

RANK = int(os.environ.get("RANK", "0"))
PROBES = ProbeConfig(n_queries=8, n_features=8, batch_tokens=256)
DOMAINS = {"near": rows(20, "sums", seed=50), "far": rows(20, "poems", seed=90)}
N_STEPS = 4
_TIMING = ("_runtime", "_per_second")


def made_model(lora: bool) -> Any:
    """The model before training, on any number of processes the same."""
    model = tiny_model("llama")
    if lora:
        torch.manual_seed(1)
        return get_peft_model(
            model, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
        )
    return model


def split_model(folder: Path) -> Any:
    """The same model with its matrices split over the ranks; the first of them writes it."""
    made_model(lora=False).save_pretrained(folder)
    torch.distributed.barrier()
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")


def made_monitor(model: nn.Module) -> Monitor:
    """The engine with the settings of `made_callback`, for one process."""
    return Monitor(
        model,
        tiny_tokenizer(),
        sae=rotated_sae(),
        train_data=rows(40),
        domains=DOMAINS,
        config=PROBES,
        progress=False,
    )


def made_callback(harmful: bool = False, **options: Any) -> STSCallback:
    """A callback that checks every step; if `harmful`, any rise of NLL on two checks running is an alarm."""
    if harmful:
        options = {"protect": {"far": 1e-6}, "policy": PolicyConfig(min_drift=1e-6, patience=2), **options}
    defaults: dict[str, Any] = {"protect": ["near"], "check_on": 1, "max_overhead": None}
    return STSCallback(sae=rotated_sae(), domains=DOMAINS, train_data=rows(40), probes=PROBES, **{**defaults, **options})


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, whole, on every rank."""
    parameters = dict(model.named_parameters())
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: p.detach().clone() for name, p in parameters.items()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for name, p in parameters.items()}


class Witness(TrainerCallback):
    """Sees every forward outside training and, standing behind the callback in the list, every decision."""

    def __init__(self, callback: STSCallback | None) -> None:
        self.callback = callback
        self.forwards: list[dict[str, Any]] = []
        self.decisions: list[tuple[Any, ...]] = []
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def watch(self, model: nn.Module) -> None:
        def begun(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not module.training:
                self.forwards.append({"shape": tuple(kwargs["input_ids"].shape), "ended": False})

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            if not module.training:
                self.forwards[-1]["ended"] = True

        model.register_forward_pre_hook(begun, with_kwargs=True)
        model.register_forward_hook(ended)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights[state.global_step] = full_weights(model)
        verdict = self.callback.verdict if self.callback else None
        told = (verdict.step, verdict.decision, verdict.threatened) if verdict else ()
        self.decisions.append((state.global_step, *told, control.should_save, control.should_training_stop))


class First(TrainerCallback):
    """Stands before the callback: lets the witness look at the model as training knows it, and sets what a case asks for."""

    def __init__(self, witness: Witness, case: dict[str, Any]) -> None:
        self.witness, self.case = witness, case

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.witness.watch(model)
        if parallelism := self.case.get("parallelism"):  # accelerate wants GPUs for it
            AcceleratorState().parallelism_config = ParallelismConfig(**parallelism)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step == self.case.get("stop_at")


def arguments(mode: str, out: Path, options: dict[str, Any]) -> TrainingArguments:
    """Settings of a run in one distributed mode."""
    modes: dict[str, dict[str, Any]] = {
        "ddp": {"ddp_backend": "gloo"},
        "fsdp2": {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}},
        "tp": {"ddp_backend": "gloo"},
        "zero3": {
            "deepspeed": {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            }
        },
    }
    shared: dict[str, Any] = {
        "max_steps": N_STEPS,
        "gradient_accumulation_steps": 2,
        "ddp_timeout": 45,  # seconds that one rank waits for another: a hang becomes an error with a place
    }
    args = TrainingArguments(**tiny_arguments(out, **{**shared, **modes[mode], **options}))
    if mode in ("fsdp2", "tp"):  # accelerate takes these for a thing of GPUs: it would fall back to DDP, or refuse
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        AcceleratorState._reset_state(False)
    return args


@contextmanager
def fault(kind: str | None) -> Iterator[None]:
    """Something that goes wrong on one rank only, named `<what>@<rank>`; in checks, at step 2 (the disk stays full)."""
    what, _, where = (kind or "").partition("@")
    if not what or int(where) != RANK:
        yield
        return
    check, append_check = Monitor.check, RunDirectory.append_check

    def broken_check(self: Monitor, step: int, **kwargs: Any) -> Any:
        if step == 2:
            raise RuntimeError("injected into a check")
        return check(self, step, **kwargs)

    def broken_after_check(self: Monitor, step: int, **kwargs: Any) -> Any:
        found = check(self, step, **kwargs)
        if step == 2:
            raise RuntimeError("injected after a check")
        return found

    def broken_forecast(self: Monitor) -> Any:
        raise RuntimeError("injected into the forecast")

    def refused_forecast(self: Monitor) -> Any:
        raise CannotTell("injected into the forecast")

    def short_of_memory(self: Monitor, step: int, *, batch_tokens: int, **others: Any) -> Any:
        if step >= 2 and batch_tokens > PROBES.batch_tokens // 2:
            raise RuntimeError("CUDA out of memory. Injected into a check")
        return check(self, step, batch_tokens=batch_tokens)

    def disk_full(self: RunDirectory, snapshot: Any, *args: Any) -> None:
        if snapshot.step >= 2:
            raise OSError(errno.ENOSPC, "injected: no space left")
        append_check(self, snapshot, *args)

    patches: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "check": (Monitor, "check", broken_check),
        "after-check": (Monitor, "check", broken_after_check),
        "memory": (Monitor, "check", short_of_memory),
        "forecast": (Monitor, "forecasts", broken_forecast),
        "refusal": (Monitor, "forecasts", refused_forecast),
        "disk-full": (RunDirectory, "append_check", disk_full),
    }
    with mock.patch.object(*patches[what]):
        yield


def copied_checkpoint(folder: Path, out: Path) -> str:
    """The checkpoint of an earlier case: all ranks need it to resume, the first has it whole. `sts/` is left to the first."""
    (source,) = (folder / "rank-0").glob("checkpoint-*")
    if RANK > 0:
        (out / source.name).mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if not (out / source.name / file.name).exists():
                (shutil.copytree if file.is_dir() else shutil.copy)(file, out / source.name / file.name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return str(out / source.name)


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One training run; an error of it is part of what was seen."""
    if "resumes" in case:
        folder = folder.with_name(case["resumes"])
    out = folder / f"rank-{RANK}"
    args = arguments(case["mode"], out, case.get("options", {}))
    checkpoint = copied_checkpoint(folder, out) if "resumes" in case else None
    callback = made_callback(**case["callback"]) if case["callback"] is not None else None
    witness = Witness(callback)
    tokenizer = tiny_tokenizer()
    with ExitStack() as stack:
        stack.enter_context(fault(case.get("fault")))
        trainer = Trainer(
            model=split_model(folder / "model") if case["mode"] == "tp" else made_model(case.get("lora", False)),
            args=args,
            train_dataset=tokenised(rows(case.get("n_rows", 40)), tokenizer),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[First(witness, case), *([callback] if callback else []), witness],
        )
        if callback is not None and case.get("attached"):
            callback.attach(trainer)
        if case.get("without_dropout"):
            for module in trainer.model.modules():
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
        error = None
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "model": type(trainer.model).__name__,
        "distributed": str(trainer.accelerator.distributed_type),
        "n_ranks": trainer.args.world_size,
        "log": [
            {k: v for k, v in row.items() if not k.endswith(_TIMING)}
            for row in trainer.state.log_history
            if not any(key.startswith("sts/") for key in row)
        ],
        "steps": trainer.state.global_step,
        "weights": witness.weights,
        "forwards": witness.forwards,
        "decisions": witness.decisions,
        "rehearsal": callback.rehearsal.to_dict() if callback and callback.rehearsal else None,
        "ours": sorted(str(file.relative_to(out)) for file in out.rglob("*") if "sts" in file.parts and file.is_file()),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # each training collects garbage, and would look through all that was imported
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        (folder / name).mkdir(exist_ok=True)
        seen = run(case, folder / name)
        torch.save(seen, folder / name / f"seen-{RANK}.part")
        os.replace(folder / name / f"seen-{RANK}.part", folder / name / f"seen-{RANK}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
