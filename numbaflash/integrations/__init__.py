"""Ways into numbaflash from other libraries: a module for each, imported only when asked for."""
