#!/usr/bin/env bash
# An environment for `tools/bench.py flat`: the project's requirements and TorchRec, in .venv-bench beside .venv.
#   bash tools/bench_env.sh
#   .venv-bench/bin/python tools/bench.py flat
# TorchRec is installed without its own requirements: they ask for the CUDA build of FBGEMM and an older torchmetrics.
MEGAREC_VENV=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv-bench
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
use_environment
python -m pip install --quiet --disable-pip-version-check tensordict==0.15.3 torchmetrics==1.9.0 typing-inspect portalocker
python -m pip install --quiet --disable-pip-version-check --no-deps torchrec==1.8.0 pyre-extensions==0.0.32 iopath==0.1.10
python -W ignore -c 'import torchrec; print(f"TorchRec {torchrec.__version__} is ready: .venv-bench/bin/python tools/bench.py flat")'
