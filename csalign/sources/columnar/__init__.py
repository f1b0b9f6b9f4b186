"""Image-text Parquet and Arrow files, as data sets on the Hugging Face hub are kept."""
