"""FlashAttention2: see `pascalvl.plugins.ops.flash_attention.op`."""
