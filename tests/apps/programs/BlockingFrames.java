// SPDX-License-Identifier: Apache-2.0
// The same server and client as frames.py, with a blocking thread per connection.

import java.io.DataInputStream;
import java.io.EOFException;
import java.io.IOException;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;

public final class BlockingFrames {
    private static final int THREADS = 4;
    private static final int[] SIZES = {
        0, 1, 17, 1000, 4096, 65_537, 300_000, 2_000_000, 5, 70_000, 0, 12
    };
    private static final AtomicInteger failures = new AtomicInteger();

    private interface Work {
        void run() throws IOException;
    }

    private static Thread start(Work work) {
        Thread thread = new Thread(() -> {
            try {
                work.run();
            } catch (Exception | Error problem) {
                failures.incrementAndGet();
                problem.printStackTrace();
            }
        });
        thread.start();
        return thread;
    }

    private static byte[] reversed(byte[] frame) {
        byte[] answer = new byte[frame.length];
        for (int i = 0; i < frame.length; i++) {
            answer[frame.length - 1 - i] = frame[i];
        }
        return answer;
    }

    private static byte[] head(int size) {
        return ByteBuffer.allocate(4).putInt(size).array();
    }

    private static void handle(Socket socket) throws IOException {
        try (socket) {
            DataInputStream in = new DataInputStream(socket.getInputStream());
            OutputStream out = socket.getOutputStream();
            while (true) {
                int size;
                try {
                    size = in.readInt();
                } catch (EOFException end) {
                    return;
                }
                byte[] frame = new byte[size];
                in.readFully(frame);
                out.write(head(size));
                out.write(reversed(frame));
            }
        }
    }

    private static void serve() throws Exception {
        ServerSocket listener = new ServerSocket(0, 64, InetAddress.getByName("127.0.0.1"));
        List<Thread> threads = new ArrayList<>();
        System.out.println(listener.getLocalPort());
        Thread acceptor = new Thread(() -> {
            while (true) {
                try {
                    Socket socket = listener.accept();
                    threads.add(start(() -> handle(socket)));
                } catch (IOException closed) {
                    return;
                }
            }
        });
        acceptor.start();
        System.in.read();
        // Closing from this thread has to wake the one in accept().
        listener.close();
        acceptor.join();
        for (Thread thread : threads) {
            thread.join();
        }
    }

    private static long exchange(Socket socket, int seed) throws IOException {
        Random source = new Random(seed);
        DataInputStream in = new DataInputStream(socket.getInputStream());
        OutputStream out = socket.getOutputStream();
        long total = 0;
        for (int round = 0; round < 3; round++) {
            // The second round reads with a timeout, which takes another path.
            socket.setSoTimeout(round == 1 ? 20_000 : 0);
            for (int size : SIZES) {
                byte[] frame = new byte[size];
                source.nextBytes(frame);
                out.write(head(size));
                out.write(frame);
                if (in.readInt() != size) {
                    throw new IOException("another length came back");
                }
                byte[] answer = new byte[size];
                in.readFully(answer);
                if (!Arrays.equals(answer, reversed(frame))) {
                    throw new IOException("other bytes came back, frame of " + size);
                }
                total += 2L * (4 + size);
            }
        }
        return total;
    }

    private static void request(int port) throws Exception {
        List<Socket> sockets = new ArrayList<>();
        List<Thread> threads = new ArrayList<>();
        AtomicLong total = new AtomicLong();
        for (int i = 0; i < THREADS; i++) {
            Socket socket = new Socket("127.0.0.1", port);
            int seed = i;
            sockets.add(socket);
            threads.add(start(() -> total.addAndGet(exchange(socket, seed))));
        }
        for (Thread thread : threads) {
            thread.join();
        }
        System.out.printf("{\"threads\": %d, \"bytes\": %d}%n",
            THREADS - failures.get(), total.get());
        System.in.read();
        for (Socket socket : sockets) {
            Thread reader = start(() -> {
                if (socket.getInputStream().read() != -1) {
                    throw new IOException("bytes after the last frame");
                }
            });
            socket.shutdownOutput();
            reader.join();
            socket.close();
        }
    }

    public static void main(String[] arguments) throws Exception {
        if (arguments[0].equals("server")) {
            serve();
        } else {
            request(Integer.parseInt(arguments[1]));
        }
        System.exit(failures.get() == 0 ? 0 : 1);
    }
}
