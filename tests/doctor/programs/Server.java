// SPDX-License-Identifier: Apache-2.0
import java.net.InetAddress;
import java.net.ServerSocket;

/** Listens, says so, and lives as long as its standard input. */
class Server {
	public static void main(String[] args) throws Exception {
		try (var server = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
			System.out.println(server.getLocalPort());
			while (System.in.read() >= 0) {
			}
		}
	}
}
