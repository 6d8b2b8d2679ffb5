"""Everything that touches bitsandbytes: quantized layers, and 8-bit blocks of optimizer state."""
