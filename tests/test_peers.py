"""Every method of TorchJD 0.18, of LibMTL and of the seven code bases has a name here, or a reason to be left out."""

import pytest

from balance import Balancer, gradient_balancers, loss_balancers

# Each name of a peer, and what it is here: a loss balancer, a gradient balancer, or a pair
TORCHJD = {
    "AlignedMTL": (None, "aligned_mtl"),
    "CAGrad": (None, "cagrad"),
    "ConFIG": (None, "config"),
    "Constant (aggregator)": ("constant", None),
    "CRMOGM": (None, "cr_mogm"),
    "DualProj": (None, "dualproj"),
    "ExcessMTL": (None, "excess_mtl"),
    "FairGrad": (None, "fairgrad"),
    "GradDrop": (None, "graddrop"),
    "GradVac": (None, "gradvac"),
    "IMTLG": (None, "imtl"),
    "Krum": (None, "krum"),
    "Mean (aggregator)": (None, "mean"),
    "MGDA": (None, "mgda"),
    "MoDo": (None, "modo"),
    "NashMTL": (None, "nashmtl"),
    "PCD": (None, "pcd"),
    "PCGrad": (None, "pcgrad"),
    "Random (aggregator)": (None, "random"),
    "SDMGrad": (None, "sdmgrad"),
    "Sum (aggregator)": (None, "sum"),
    "TrimmedMean": (None, "trimmed_mean"),
    "UPGrad": (None, "upgrad"),
    "Constant (scalarizer)": ("constant", None),
    "COSMOS": ("cosmos", None),
    "DWA": ("dwa", None),
    "FAMO": ("famo", None),
    "GeometricMean": ("gls", None),
    "IMTLL": ("imtl_l", None),
    "Mean (scalarizer)": ("ls", "mean"),
    "PBI": ("pbi", None),
    "Random (scalarizer)": ("rlw", None),
    "STCH": ("stch", None),
    "Sum (scalarizer)": ("ls", None),
    "UW": ("uw", None),
}
BILEVEL = "bilevel: it differentiates through an update of the network, which is another training loop and no stage in one"
LIBMTL = {
    "EW": ("ls", None),
    "GradNorm": (None, "gradnorm"),
    "UW": ("uw", None),
    "MGDA": (None, "mgda"),
    "DWA": ("dwa", None),
    "GLS": ("gls", None),
    "GradDrop": (None, "graddrop"),
    "PCGrad": (None, "pcgrad"),
    "GradVac": (None, "gradvac"),
    "IMTL": ("imtl_l", "imtl"),
    "CAGrad": (None, "cagrad"),
    "Nash_MTL": (None, "nashmtl"),
    "RLW": ("rlw", None),
    "MoCo": (None, "moco"),
    "Aligned_MTL": (None, "aligned_mtl"),
    "DB_MTL": (None, "db_mtl"),
    "STCH": ("stch", None),
    "ExcessMTL": (None, "excess_mtl"),
    "FairGrad": (None, "fairgrad"),
    "FAMO": ("famo", None),
    "MoDo": (None, "modo"),
    "SDMGrad": (None, "sdmgrad"),
    "UPGrad": (None, "upgrad"),
    "MOML": BILEVEL,
    "FORUM": BILEVEL,
    "AutoLambda": BILEVEL,
}
CODE_BASES = {  # Nash-MTL, FAMO, GO4Align, IGB4MTL, CAGrad, and the splitter, which is balance.Splitter
    "ls": ("ls", None),
    "stl": ("stl", None),
    "scaleinvls": ("scaleinvls", None),
    "si": ("scaleinvls", None),
    "rlw": ("rlw", None),
    "rlwlog": (("scaleinvls", "rlw"), None),
    "dwa": ("dwa", None),
    "dwalog": (("scaleinvls", "dwa"), None),
    "uw": ("uw", None),
    "uwlog": (("scaleinvls", "uw"), None),
    "igbv1": ("igbv1", None),
    "igbv2": ("igbv2", None),
    "famo": ("famo", None),
    "go4align": ("go4align", None),
    "mgda": (None, "mgda"),
    "pcgrad": (None, "pcgrad"),
    "cagrad": (None, "cagrad"),
    "imtl": (None, "imtl"),
    "nashmtl": (None, "nashmtl"),
    "graddrop": (None, "graddrop"),
    "log_mgda": ("scaleinvls", "mgda"),
    "log_cagrad": ("scaleinvls", "cagrad"),
    "log_imtl": ("scaleinvls", "imtl"),
}
PEERS = {"TorchJD": TORCHJD, "LibMTL": LIBMTL, "code bases": CODE_BASES}
PAIRS = [
    pytest.param(*here, id=f"{peer}-{name}")
    for peer, methods in PEERS.items()
    for name, here in methods.items()
    if not isinstance(here, str)
]


def test_the_lists_are_whole():
    assert [len(PEERS[peer]) for peer in ("TorchJD", "LibMTL")] == [35, 26]
    assert {name for methods in PEERS.values() for name, here in methods.items() if isinstance(here, str)} == {
        "MOML",
        "FORUM",
        "AutoLambda",
    }


@pytest.mark.parametrize(("loss", "gradient"), PAIRS)
def test_every_method_of_a_peer_can_be_built(loss, gradient):
    for name in [loss] if isinstance(loss, str) else loss or ():
        assert name in loss_balancers
    assert gradient is None or gradient in gradient_balancers
    Balancer(4, loss=loss or "ls", gradient=gradient)
