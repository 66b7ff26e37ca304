"""Elements of nftables' dynamic sets and maps as a SAMI driver: rate limits, port knocking, learned addresses."""

from sami_plugin.drivers.nft_sets.driver import NftSetsDriver

__all__ = ["NftSetsDriver"]
