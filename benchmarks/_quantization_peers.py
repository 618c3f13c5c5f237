"""Runs in a peer's own environment, once a candidate: quantize a float graph with one configuration of one tool.

    python _quantization_peers.py TOOL CONFIG FLOAT.onnx CALIB_FOLDER OUT.onnx
    python _quantization_peers.py TOOL float  FLOAT.onnx CALIB_FOLDER

The second form only imports the tool and runs the float graph over the samples: the memory that is not the tool's. Needs
numpy and the tool; never edgekit, except for edgekit's own second form. `quantization.py` calls it.
"""

from __future__ import annotations

import functools
import importlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: What pip installs for each tool, in turn, in an environment of its own: ModelOpt pins an older onnx than the others take.
#: `nvidia-modelopt[onnx]` would pull CUDA's cupy and onnxruntime-gpu; this is the rest of it, with the CPU's onnxruntime.
PACKAGES: dict[str, list[str]] = {
    "onnxruntime": ["onnxruntime==1.32.0 onnx==1.23.2 scipy sympy numpy"],
    "nncf": ["nncf==3.4.0 onnx==1.23.2 onnxruntime==1.32.0"],
    "modelopt": [
        "torch==2.13.0 onnxruntime==1.24.4 onnx~=1.21.0 onnx-graphsurgeon>=0.6.1 onnxconverter-common~=1.16.0 onnxscript "
        "onnxslim>=0.1.76 polygraphy>=0.53.4 cppimport lief ml_dtypes ninja nvidia-ml-py packaging setuptools>=80 tqdm PyYAML "
        "omegaconf pulp<4 pydantic>=2 regex rich safetensors scipy numpy",
        "--no-deps nvidia-modelopt==0.47.0",
    ],
}
MODULES = {
    "onnxruntime": "onnxruntime.quantization",
    "nncf": "nncf",
    "modelopt": "modelopt.onnx.quantization",
    "edgekit": "edgekit.quantization",
}
WEIGHTED = ["Conv", "ConvTranspose", "MatMul", "Gemm"]
#: tool -> configuration -> options of its function below. ``inputs``: Q/DQ at the inputs of what multiplies and nowhere else,
#: where TensorRT wants it; without, wherever the tool puts it.
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "onnxruntime": {
        "minmax": {"method": "MinMax"},
        "entropy": {"method": "Entropy", "bins": 512},
        "minmax, inputs": {"method": "MinMax", "inputs": True},
        "minmax average, inputs": {"method": "MinMax", "inputs": True, "CalibMovingAverage": True},
        "percentile 99.99, inputs": {"method": "Percentile", "inputs": True, "CalibPercentile": 99.99},
        "percentile 99.999, inputs": {"method": "Percentile", "inputs": True, "CalibPercentile": 99.999},
        "entropy, inputs": {"method": "Entropy", "inputs": True, "bins": 512},
    },
    "nncf": {
        "default": {},
        "performance": {"preset": "PERFORMANCE", "overflow_fix": "DISABLE"},
        "performance, bias correction": {"preset": "PERFORMANCE", "overflow_fix": "DISABLE", "fast_bias_correction": False},
        "signed": {"signed": True, "overflow_fix": "DISABLE"},
        "signed, bias correction": {"signed": True, "overflow_fix": "DISABLE", "fast_bias_correction": False},
        "signed, transformer": {"signed": True, "overflow_fix": "DISABLE", "model_type": "TRANSFORMER"},
        "mixed": {"preset": "MIXED", "overflow_fix": "DISABLE"},
        "transformer": {"model_type": "TRANSFORMER", "overflow_fix": "DISABLE"},
    },
    "modelopt": {
        "max": {"calibration_method": "max"},
        "entropy": {"calibration_method": "entropy"},
        "entropy, inputs": {"calibration_method": "entropy", "op_types_to_quantize": WEIGHTED},
    },
}

Feeds = dict[str, "np.ndarray[Any, Any]"]


def samples(folder: Path) -> Iterator[Feeds]:
    """The folder's ``.npz`` in order, read one at a time."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as file:
            yield {name: file[name] for name in file.files}


class Reader:
    """onnxruntime's CalibrationDataReader, streaming. ModelOpt takes one too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rewind()

    def __len__(self) -> int:
        return len(list(self._folder.glob("*.npz")))

    def rewind(self) -> None:
        self._left = samples(self._folder)

    def get_next(self) -> Feeds | None:
        return next(self._left, None)

    def get_first(self) -> Feeds:
        return next(samples(self._folder))

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self._left)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(list(samples(self._folder))[start_index:end_index])


def run_onnxruntime(
    source: Path, calib: Path, out: Path, method: str, inputs: bool = False, bins: int = 0, **extra: Any
) -> None:
    """quantize_static after the documented preprocessing: Q/DQ, symmetric int8, weights per channel.

    ``bins`` of the histograms: `quantize_static` does not pass them on, and its default of 128 for entropy
    clips nothing; 2,048 take minutes a model.
    """
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    module: Any = importlib.import_module("onnxruntime.quantization.quantize")
    make = module.create_calibrator

    def with_bins(*args: Any, extra_options: Any = None, **kwargs: Any) -> Any:
        return make(*args, extra_options={**(extra_options or {}), **({"num_bins": bins} if bins else {})}, **kwargs)

    module.create_calibrator = with_bins
    with tempfile.TemporaryDirectory() as folder:
        prepared, plain = Path(folder) / "prepared.onnx", Path(folder) / "plain.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quant_pre_process(str(source), str(plain), skip_symbolic_shape=True, skip_optimization=True)
        extra = {"ActivationSymmetric": True, "WeightSymmetric": True, **extra}
        if inputs:
            extra["OpTypesToExcludeOutputQuantization"] = WEIGHTED
        quantize = functools.partial(
            q.quantize_static,
            model_output=str(out),
            quant_format=q.QuantFormat.QDQ,
            op_types_to_quantize=WEIGHTED if inputs else None,
            per_channel=True,
            activation_type=q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
            calibrate_method=getattr(q.CalibrationMethod, method),
        )
        try:
            quantize(str(prepared), calibration_data_reader=Reader(calib), extra_options=extra)
        except ValueError:  # 1.32 fails on a Gemm with a bias (1, N), which its own optimization makes of MatMul and Add
            quantize(str(plain), calibration_data_reader=Reader(calib), extra_options=extra)


def run_nncf(source: Path, calib: Path, out: Path, signed: bool = False, **options: Any) -> None:
    """nncf.quantize over all the samples.

    Without ``overflow_fix`` its default, which halves the weights' range on x86. ``signed`` keeps its symmetric scheme from
    another zero point where nothing is negative, for TensorRT takes zero alone; no option of NNCF's says so.
    """
    import nncf
    import onnx

    names = {"preset": nncf.QuantizationPreset, "model_type": nncf.ModelType}
    chosen = {key: getattr(names[key], value) if key in names else value for key, value in options.items()}
    advanced: dict[str, Any] = {}
    if fix := chosen.pop("overflow_fix", None):
        advanced["overflow_fix"] = getattr(nncf.OverflowFix, fix)
    if signed:
        module: Any = importlib.import_module("nncf.quantization.fake_quantize")
        ranges = module.symmetric_range
        module.symmetric_range = lambda low, high, *rest: ranges(-high, high, *rest)
        chosen["preset"] = nncf.QuantizationPreset.PERFORMANCE
    feeds = list(samples(calib))
    parameters = nncf.AdvancedQuantizationParameters(**advanced)
    made = nncf.quantize(
        onnx.load(source), nncf.Dataset(feeds), subset_size=len(feeds), advanced_parameters=parameters, **chosen
    )
    onnx.save(made, out)


def run_modelopt(source: Path, calib: Path, out: Path, **options: Any) -> None:
    """modelopt.onnx.quantization.quantize to int8; what stays float stays float32, as everybody's."""
    from modelopt.onnx.quantization import quantize

    with tempfile.TemporaryDirectory() as folder:  # it writes intermediate graphs beside its input
        copy = Path(folder) / "model.onnx"
        shutil.copy(source, copy)
        quantize(
            str(copy),
            quantize_mode="int8",
            calibration_data_reader=Reader(calib),
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=str(out),
            **options,
        )


def run_float(source: Path, calib: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    for feeds in samples(calib):
        session.run(None, feeds)


def main() -> None:
    tool, config, source, calib = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    try:
        importlib.import_module(MODULES[tool])
        if config == "float":
            run_float(source, calib)
            time.sleep(0.1)  # the parent reads the peak while the process lives
        else:
            run = {"onnxruntime": run_onnxruntime, "nncf": run_nncf, "modelopt": run_modelopt}[tool]
            run(source, calib, Path(sys.argv[5]), **CONFIGS[tool][config])
            time.sleep(0.1)
    except Exception as error:  # noqa: BLE001  whatever a peer raises is its result
        text = (str(error).strip().splitlines() or [""])[0]
        print(f"\nERROR {type(error).__name__}: {text}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
