"""Bring an artifact into another model: `transfer`, and the report of how well that should work."""

from steer.transfers.report import LayerReport, TransferReport
from steer.transfers.transfer import METHODS, Transferred, transfer

__all__ = ["METHODS", "LayerReport", "TransferReport", "Transferred", "transfer"]
