"""The `hqq-oft` command line: whole models from one directory to another, and what a bug report needs."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from hqq.core.quantize import HQQLinear

from ._installation import __version__
from .checkpoint import load
from .checkpoint.atomic_directory import check_replaceable, staged_directory
from .checkpoint.files import CONFIG, QMODEL, read_json
from .checkpoint.save import copy_into, save_quantized
from .cli_inputs import (
    COMPANIONS,
    CommandError,
    bits,
    check_adapter,
    check_device,
    check_settings,
    into,
    load_dense,
    local_directory,
    override,
    positive,
    silenced,
)
from .quant.settings import QuantizationSettings
from .quant.solver import Solver

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0 on success, 1 on failure, 130 on interrupt (2: wrong usage)."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        with silenced(getattr(options, "quiet", False)):
            command(options)
    except KeyboardInterrupt:
        print("hqq-oft: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (CommandError, OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
        if options.traceback:
            raise
        print(f"hqq-oft: {error or type(error).__name__}", file=sys.stderr)
        return error.status if isinstance(error, CommandError) else 1
    return 0


# --- Commands --------------------------------------------------------------------------------------------------------


def _quantize(options: argparse.Namespace) -> None:
    from transformers import AutoConfig, PreTrainedModel

    from . import quantize_model

    source, target = _directories(options)
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise CommandError(f"{source} is already quantized; start from the dense model.")
    model_class = _model_class(source)
    assert issubclass(model_class, PreTrainedModel)
    settings = QuantizationSettings(options.nbits, options.group_size, options.axis)
    check_settings(model_class, config, settings, options.skip or [], dict(options.override))
    model = load_dense(model_class, source)
    report = quantize_model(
        model,
        nbits=options.nbits,
        group_size=options.group_size,
        axis=options.axis,
        compute_dtype=DTYPES.get(options.dtype),
        device=options.device,
        skip_modules=options.skip or (),
        overrides=dict(options.override),
        solver=options.solver,
        progress=not options.quiet,
    )
    save_quantized(
        model, target, max_shard_size=options.max_shard_size, overwrite=options.force, extra_files=_companions(source)
    )
    _say(options, f"{report}\nwritten to {target}")


def _merge(options: argparse.Namespace) -> None:
    from peft import PeftModel

    from . import load_quantized, merge_report, patch_peft

    source, target = _directories(options)
    adapter = local_directory(options.adapter)
    check_adapter(adapter)
    model = load_quantized(source, device=options.device, progress=not options.quiet)
    bar = sys.stderr.isatty() and not options.quiet
    with patch_peft():
        adapted = PeftModel.from_pretrained(model, str(adapter))
        if options.report:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the report is printed instead
                print(merge_report(adapted, solver=options.solver))
        merged = adapted.merge_and_unload(progressbar=bar, safe_merge=True, into=options.into, solver=options.solver)
    errors = adapted.base_model.merge_errors().values()
    if not errors:
        raise CommandError(f"the adapter in {adapter} targets no quantized layer of {source}.")
    if any(isinstance(module, HQQLinear) for module in merged.modules()):
        save_quantized(
            merged,
            target,
            max_shard_size=options.max_shard_size,
            overwrite=options.force,
            extra_files=_companions(source),
        )
    else:
        with staged_directory(target, options.force) as staging:
            merged.save_pretrained(str(staging), max_shard_size=options.max_shard_size)
            copy_into(staging, _companions(source))
    _say(options, f"{len(errors)} layer(s) merged, worst weight error {max(errors):.2%}\nwritten to {target}")


def _convert(options: argparse.Namespace) -> None:
    from .checkpoint.convert import convert_checkpoint

    source, target = _directories(options, QMODEL)
    left_out = convert_checkpoint(source, target, options.max_shard_size, options.force, _companions(source))
    for name in left_out:
        print(f"hqq-oft: left out {name}: the model has no such tensor", file=sys.stderr)
    _say(options, f"written to {target}")


def _env(options: argparse.Namespace) -> None:
    from .env import report

    print(report())


def _check(options: argparse.Namespace) -> None:
    from . import check

    try:
        device = check.usable_device(options.device)
    except ValueError as error:
        raise CommandError(str(error), status=2) from error
    report = check.run(device)
    print(report.markdown())
    try:
        recorded = f"recorded in {report.save()}"
    except OSError as error:
        recorded = f"not recorded: {error}"
    if report.faults:
        raise CommandError(f"{len(report.faults)} fault(s), {recorded}")
    print(f"hqq-oft: {recorded}", file=sys.stderr)


def _directories(options: argparse.Namespace, *files: str) -> tuple[Path, Path]:
    """Source and target directory, validated before any work starts; `files` as in `local_directory`."""
    if hasattr(options, "device"):
        check_device(options.device)
    try:
        check_replaceable(options.out, options.force)
    except FileExistsError as error:
        raise CommandError(str(error)) from error
    source, target = local_directory(options.model, *files), options.out
    if not (source / CONFIG).is_file():
        raise CommandError(f"{source} contains no {CONFIG}: give the directory of a transformers model.")
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise CommandError(f"{target} is {source} or inside it; choose another directory for the result.")
    return source, target


def _model_class(source: Path) -> Any:
    return load.model_class(source / CONFIG, read_json(source / CONFIG))[0]


def _companions(source: Path) -> list[Path]:
    return sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(text)


# --- Command line ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hqq-oft",
        description="Orthogonal Fine-Tuning on HQQ-quantized models: whole models on the command line.",
        epilog="Exit status: 0 success, 1 failure (the reason is on stderr; nothing was written), 2 wrong usage, "
        "130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"hqq-oft {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = _add(
        commands,
        "quantize",
        _quantize,
        "quantize a dense transformers model",
        """examples:
  hqq-oft quantize llama llama-4bit
  hqq-oft quantize HuggingFaceTB/SmolLM2-135M smollm2-4bit
  hqq-oft quantize llama llama-3bit --nbits 3 --dtype bfloat16 --device cuda
  hqq-oft quantize llama llama-mixed --override down_proj=nbits:8 --override 'model.layers.0.*=dense'""",
    )
    quantize.add_argument(
        "model", metavar="MODEL", help="a dense transformers model: a directory, or OWNER/NAME on the hub"
    )
    _add_output(quantize)
    _add_solver(quantize)
    quantize.add_argument("--nbits", type=bits, default=4, help="8, 6, 5, 4, 3, 2, 1.58 or 1 (default: 4)")
    quantize.add_argument(
        "--group-size", type=positive, default=64, help="weights per scale: a multiple of 8 (default: 64)"
    )
    quantize.add_argument("--axis", type=int, default=1, choices=(0, 1), help="1: groups along a row; 0: down a column")
    quantize.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="compute dtype; auto: as stored")
    quantize.add_argument(
        "--skip",
        action="append",
        metavar="NAME",
        help="a layer to leave dense, besides heads and routers; can be repeated",
    )
    quantize.add_argument(
        "--override",
        action="append",
        default=[],
        type=override,
        metavar="NAME=SETTINGS",
        help="settings for layers matching a name, a name suffix or a pattern: nbits:8,group_size:32,axis:1, or dense",
    )

    merge = _add(
        commands,
        "merge",
        _merge,
        "merge a PEFT adapter into a quantized model",
        """examples:
  hqq-oft merge llama-4bit adapter merged --report
  hqq-oft merge llama-2bit adapter merged --into 8
  hqq-oft merge llama-4bit adapter merged --into dense""",
    )
    merge.add_argument("model", metavar="MODEL", help="a quantized model: a directory, or OWNER/NAME on the hub")
    merge.add_argument("adapter", metavar="ADAPTER", help="a PEFT adapter: a directory, or OWNER/NAME on the hub")
    _add_output(merge)
    _add_solver(merge)
    merge.add_argument(
        "--into", type=into, metavar="BITS|dense", help="format of merged layers (default: their current settings)"
    )
    merge.add_argument("--report", action="store_true", help="first show the errors of this merge and its alternatives")

    convert = _add(
        commands,
        "convert",
        _convert,
        "rewrite an HQQ model that HQQ itself or another version of transformers stored",
        """examples:
  hqq-oft convert Llama-2-7b-hf-4bit_g64-HQQ llama-4bit
  hqq-oft convert mobiuslabsgmbh/Llama-2-7b-hf-4bit_g64-HQQ llama-4bit

Reads qmodel.pt (tensors and settings, never code), HQQ's safetensors files, and the names of other transformers.""",
    )
    convert.add_argument("model", metavar="MODEL", help="the stored model: a directory, or OWNER/NAME on the hub")
    _add_output(convert, device=False)

    _add(
        commands,
        "env",
        _env,
        "print versions, devices, and which backend serves each operation",
        "examples:\n  hqq-oft env",
    )

    check = _add(
        commands,
        "check",
        _check,
        "compare every operation on a device with float64, and time it",
        """examples:
  hqq-oft check
  hqq-oft check --device cuda

Prints a report in Markdown and records it in the user's cache folder. Exit status: 0 no faults, 1 faults.""",
    )
    check.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or the CPU without one)")
    return parser


def _add(
    commands: Any, name: str, command: Callable[[argparse.Namespace], None], what: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command)
    return parser


def _add_output(parser: argparse.ArgumentParser, device: bool = True) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="output directory; written atomically")
    if device:
        parser.add_argument("--device", default="cpu", help="device to compute on: cpu, cuda, ... (default: cpu)")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="maximum file size (default: 5GB)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it contains a model")
    parser.add_argument("--quiet", action="store_true", help="only warnings and errors")


def _add_solver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--solver", choices=get_args(Solver), default="hqq", help="search: smaller errors than hqq's, in more time"
    )


if __name__ == "__main__":
    sys.exit(main())
