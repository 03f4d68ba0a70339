"""Pure: bytes and values in, bytes and values out. No I/O, no clock, no log; randomness only inside `primitives`."""
