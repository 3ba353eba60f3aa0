"""Installs tf_adascale: `pip install ".[cpu]"` (or gpu, or tpu)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
VERSION = HERE / "tf_adascale" / "version.py"


def long_description():
    """Returns README.md without the pictures and links of the repository."""
    # A copy for a container may lack the file.
    text = README.read_text("utf-8") if README.exists() else ""
    text = re.sub(r"!\[[^]]*\]\((?!https://)[^)]*\)\n+", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https://)[^)]*\)", r"\1", text)


setup(
    name="tf_adascale",
    version=re.findall('__version__ = "(.+)"', VERSION.read_text())[0],
    description="AdaScale SGD: large-batch training for TensorFlow and Keras "
    "without re-tuning the learning rate.",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The tf_adascale authors",
    license="Apache-2.0",
    packages=find_packages(include=["tf_adascale", "tf_adascale.*"]),
    # An editable install is then a path, which type checkers follow.
    package_dir={"": "."},
    package_data={"tf_adascale": ["py.typed"]},
    zip_safe=False,
    # Not build/: where letters' case does not count, that is the file BUILD.
    options={"build": {"build_base": "out/build"}},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        # Some modules use hooks of Keras that are not public API. They were
        # checked on 3.10 to 3.15, so the next minor release is excluded until
        # `make test-versions` has run on it.
        "keras>=3.10,<3.16",
        "numpy>=1.26",
    ],
    # An extra selects one of TensorFlow's three builds, which exclude each
    # other. The bounds are the versions that `make test-versions` runs.
    extras_require={
        "cpu": ["tensorflow-cpu>=2.18,<2.22"],
        "gpu": ["tensorflow[and-cuda]>=2.18,<2.22"],
        # The last release for TPUs is 2.20; later libtpu does not load in it.
        "tpu": ["tensorflow-tpu>=2.18,<2.21", "libtpu<=0.0.25"],
        "plot": ["matplotlib"],  # For tf_adascale.forecast's picture.
        "examples": [
            # tensorflow-datasets needs it to prepare data, and does not
            # declare it.
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
        # To be installed with the extra "examples": the suite tests them too.
        "test": [
            "hypothesis",
            "mypy",
            "pycocotools>=2.0.11",
            "pytest>=8.2",
            "pytest-xdist",
            "pyyaml",
            "tensorboard",
        ],
        # XLA's compiler for TPUs, and the package that loads it. Both versions
        # are exact, because tests/tpu/compiler.py uses private names of JAX.
        "test-tpu": ["jax==0.10.2", "libtpu==0.0.51"],
        "dev": ["pyright[nodejs]", "ruff"],
    },
    keywords=[
        "adascale",
        "adasum",
        "distributed training",
        "keras",
        "large-batch training",
        "tensorflow",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
