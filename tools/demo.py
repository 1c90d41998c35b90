"""Demo of the whole method on drawn shapes: train, export, compare."""
from gdp_mmseg.demo.demo import main

if __name__ == '__main__':
    main()
