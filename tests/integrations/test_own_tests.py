"""A short part of the libraries' own tests, with each layer accelerated at construction."""

import subprocess

import pytest

from tests.integrations import own_tests

SHORT = {
    "nflows": "lu_test or RationalQuadratic or ActNorm or MaskedAffine or AffineCoupling or RealNVP",
    "zuko": "(test_flows or bayesian_flows) and (NICE or MAF or NSF or NCSF or RealNVP)",
}


@pytest.mark.parametrize("library", SHORT)
def test_own_tests(library, tmp_path):
    pytest.importorskip(library)
    try:
        source = own_tests.fetch(library, tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip(f"pip cannot fetch the source distribution of {library}")
    passed, layers = own_tests.run(library, source, "accelerated", ["-k", SHORT[library]])
    failed = {name for name, good in passed.items() if not good}
    assert failed <= own_tests.KNOWN.keys()
    assert len(passed) >= 10 and layers >= 40
