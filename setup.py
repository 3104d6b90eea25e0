# The shim that old tools expect: every setting stands in pyproject.toml.
from setuptools import setup

setup()
