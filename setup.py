"""Maps the top-level folders to one import root.

``kernels/``, ``benchmarks/`` and ``train/`` stand beside ``fastload/`` in the repository, and are imported only as
``fastload.kernels``, ``fastload.benchmarks`` and ``fastload.train``: bare names would collide with other packages
(Hugging Face ships one called ``kernels``). Everything static lives in pyproject.toml.
"""

from setuptools import setup

setup(
    package_dir={
        "fastload": "fastload",
        "fastload.kernels": "kernels",
        "fastload.benchmarks": "benchmarks",
        "fastload.benchmarks.peers": "benchmarks/peers",
        "fastload.benchmarks.report": "benchmarks/report",
        "fastload.train": "train",
        "fastload.train.report": "train/report",
    },
    packages=[
        "fastload",
        "fastload.beton",
        "fastload.check",
        "fastload.cli",
        "fastload.engines",
        "fastload.kernels",
        "fastload.benchmarks",
        "fastload.benchmarks.peers",
        "fastload.benchmarks.report",
        "fastload.train",
        "fastload.train.report",
    ],
    package_data={
        "fastload": ["py.typed"],
        "fastload.benchmarks.report": ["template.html.j2"],
        "fastload.check": ["template.html.j2"],
        "fastload.train.report": ["template.html.j2"],
    },
)
