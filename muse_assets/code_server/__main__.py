"""`python -m muse_assets.code_server`: the options of `dagster api grpc`."""

from muse_assets.code_server.serving import main

if __name__ == "__main__":
    main()
