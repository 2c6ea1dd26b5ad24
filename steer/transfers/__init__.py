"""Bring an artifact into another model: `transfer`, and the report of how well that should work."""

from steer.transfers.move import METHODS, Transferred, transfer
from steer.transfers.report import LayerReport, TransferReport

__all__ = ["METHODS", "LayerReport", "TransferReport", "Transferred", "transfer"]
