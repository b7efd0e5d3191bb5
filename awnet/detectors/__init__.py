"""Detectors of adversarial images, as compared in Table V of the paper: ``fit``, then ``score``."""

from awnet.detectors.base import Detector, RouterDetector
from awnet.detectors.lng import LNG
from awnet.detectors.nnif import NNIF, LastLayer

__all__ = ["LNG", "NNIF", "Detector", "LastLayer", "RouterDetector"]
