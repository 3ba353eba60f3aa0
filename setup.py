"""Installs tf_adascale: `pip install ".[cpu]"` (or gpu, or tpu)."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = HERE / "tf_adascale" / "version.py"

setup(
    name="tf_adascale",
    version=re.findall('__version__ = "(.+)"', VERSION.read_text())[0],
    description="AdaScale SGD: large-batch training for TensorFlow and Keras "
    "without re-tuning the learning rate.",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["tf_adascale", "tf_adascale.forecast"],
    package_data={"tf_adascale": ["py.typed"]},
    zip_safe=False,
    # Not build/: where letters' case does not count, that is the file BUILD.
    options={"build": {"build_base": "out/build"}},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        # wrapper.py and model.py lean on hooks of Keras that are not public
        # API. They were checked on 3.10 to 3.15, so the next minor release is
        # excluded until `make test-versions` has run on it.
        "keras>=3.10,<3.16",
        "numpy>=1.26",
    ],
    # TensorFlow comes by an extra, for its three builds exclude each other.
    # Its bounds are the versions that `make test-versions` runs.
    extras_require={
        "cpu": ["tensorflow-cpu>=2.18,<2.22"],
        "gpu": ["tensorflow[and-cuda]>=2.18,<2.22"],
        # The last release for TPUs is 2.20; later libtpu does not load in it.
        "tpu": ["tensorflow-tpu>=2.18,<2.21", "libtpu<=0.0.25"],
        "plot": ["matplotlib"],  # For tf_adascale.forecast's picture.
        "examples": [
            # tensorflow-datasets prepares with it and does not say so.
            "importlib_resources",
            "jiwer>=4.0",
            "matplotlib",
            "num2words>=0.5.14",
            "sacrebleu>=2.6",
            "scikit-learn",
            "tensorboard",
            # With TensorFlow 2.18 it needs tensorflow-metadata<1.21.
            "tensorflow-datasets>=4.9.10",
            "tokenizers>=0.23",
        ],
        # With the examples' extra: the suite tests them too.
        "test": [
            "hypothesis",
            "pycocotools>=2.0.11",
            "pytest>=8.2",
            "pytest-xdist",
            "pyyaml",
            "tensorboard",
        ],
        # XLA's compiler for TPUs, and what loads it: tests/tpu/compiler.py uses
        # what JAX does not document, so both are exact.
        "test-tpu": ["jax==0.10.2", "libtpu==0.0.51"],
        "dev": ["pyright[nodejs]", "ruff"],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
