"""Bring an artifact into another model: `transfer`, and the report of how well that should work."""

from steer.transfer.move import METHODS, Transferred, transfer
from steer.transfer.quality import LayerReport, TransferReport

__all__ = ["METHODS", "LayerReport", "TransferReport", "Transferred", "transfer"]
