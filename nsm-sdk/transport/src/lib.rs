//! gRPC over mTLS on TCP and unix sockets, with file descriptors beside the stream.
