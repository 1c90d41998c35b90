"""Write a network as ONNX; named so because ``import onnx`` looks here too."""
from gdp_mmseg.cli.onnx import main

if __name__ == '__main__':
    main()
