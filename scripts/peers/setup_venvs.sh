#!/usr/bin/env bash
# Make the peers' virtual environments: setup_venvs.sh [DIR] gives DIR/peer-llmcompressor, DIR/peer-gptqmodel and so on.
# DIR defaults to venvs/ beside the repository. Safe to run again: what is installed as pinned is left alone.
# PYTHON names the interpreter (tested: 3.11). torch comes first, so that no tool pulls its own choice; where pip would
# take a CUDA build, set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${1:-$repo/../venvs}"
dir=$(cd "${1:-$repo/../venvs}" && pwd)
torch=torch==2.13.0
common=(accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6 pillow==13.0.0 pyarrow==26.0.1 safetensors==0.8.0
    tokenizers==0.23.3)
latest=(huggingface_hub==2.4.0 transformers==5.23.0)
llmcompressor=(llmcompressor==0.14.0.1 auto-round==0.15.1 compressed-tensors==0.19.0 huggingface_hub==1.33.0
    loguru==0.7.3 pydantic==2.14.3 transformers==5.17.0)
gptqmodel_needs=(defuser==0.0.28 device-smi==0.5.7 dill==0.4.1 filelock==4.2.11 huggingface_hub==2.4.0 jinja2==3.1.6
    logbar==0.4.15 maturin==1.16.0 ninja==1.13.2 packaging==26.3 protobuf==7.36.2 pypcre==0.6.4 requests==2.34.2
    threadpoolctl==3.8.0 tokenicer==0.0.14 torchao==0.18.0 transformers==5.23.0)

install() { # install VENV REQUIREMENT...: the venv's own pip, made if missing
    local venv=$dir/$1
    shift
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

install peer-llmcompressor "$torch"
install peer-llmcompressor "$torch" "${common[@]}" "${llmcompressor[@]}"
install peer-gptqmodel "$torch"
install peer-gptqmodel "$torch" "${common[@]}" "${gptqmodel_needs[@]}"
# gptqmodel 7.7 asks for torch>=2.14.1 and would replace the build above; its CPU paths run on 2.13
install peer-gptqmodel --no-deps gptqmodel==7.7.0
for requirement in auto-round==0.16.1 bitsandbytes==0.50.2 hqq==0.2.8.post1 nvidia-modelopt==0.47.0 torchao==0.18.0; do
    tool=${requirement%%==*}
    install "peer-${tool#nvidia-}" "$torch"
    install "peer-${tool#nvidia-}" "$torch" "${common[@]}" "${latest[@]}" requests==2.34.2 "$requirement"  # modelopt imports requests
done

# What loads exports and quantizes nothing here: transformers 4, the last to read HQQ checkpoints, and those without torch:
# mlx-lm, on CPUs too, onnxruntime, and llama.cpp, which is compiled, in minutes.
install peer-hqq-transformers-4 "$torch"
install peer-hqq-transformers-4 "$torch" accelerate==1.15.0 numpy==2.4.6 safetensors==0.8.0 huggingface_hub==0.36.2 \
    tokenizers==0.22.2 transformers==4.57.6 hqq==0.2.8.post1
install peer-mlx numpy==2.4.6 safetensors==0.8.0 tokenizers==0.23.3 "${latest[@]}" "mlx[cpu]==0.32.4" mlx-lm==0.32.2
install peer-onnxruntime numpy==2.4.6 onnxruntime==1.31.1
CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF" install peer-llama-cpp llama-cpp-python==0.3.36 numpy==2.4.6

for tool in llmcompressor gptqmodel auto-round bitsandbytes hqq nvidia-modelopt torchao; do
    venv=$dir/peer-${tool#nvidia-}
    "$venv/bin/python" -c "from importlib.metadata import version as v; import torch
print('$tool', v('$tool'), 'torch', torch.__version__, 'transformers', v('transformers'), 'in', '$venv')"
done
