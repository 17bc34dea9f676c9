// SPDX-License-Identifier: Apache-2.0
// Echoes over loopback connections while other threads run into null all the time.
//
// The JVM does not compare with null before it follows a reference: it lets the CPU
// fault, and its handler of SIGSEGV makes a NullPointerException of it.  It stops its
// threads with faults as well.

import java.io.DataInputStream;
import java.io.IOException;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;

public final class NullChecks {
    private static final int CONNECTIONS = 3;
    private static final int ROUNDS = 3000;
    private static final int CHECKS = 200_000;
    private static final AtomicInteger failures = new AtomicInteger();
    private static final AtomicLong nulls = new AtomicLong();
    private static final AtomicLong bytes = new AtomicLong();

    private static final class Box {
        int value = 1;
    }

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

    private static void echo(Socket socket) throws IOException {
        byte[] buffer = new byte[8192];
        int n;
        while ((n = socket.getInputStream().read(buffer)) > 0) {
            socket.getOutputStream().write(buffer, 0, n);
        }
    }

    private static void exchange(Socket socket, int seed) throws IOException {
        Random source = new Random(seed);
        DataInputStream in = new DataInputStream(socket.getInputStream());
        OutputStream out = socket.getOutputStream();
        for (int round = 0; round < ROUNDS; round++) {
            byte[] data = new byte[1 + source.nextInt(4000)];
            source.nextBytes(data);
            out.write(data);
            byte[] answer = new byte[data.length];
            in.readFully(answer);
            if (!Arrays.equals(data, answer)) {
                throw new IOException("other bytes came back");
            }
            bytes.addAndGet(2L * data.length);
        }
    }

    private static int follow(Box box) {
        return box.value;
    }

    private static void check() {
        Box[] boxes = {new Box(), null};
        long found = 0;
        for (int i = 0; i < CHECKS; i++) {
            try {
                found += follow(boxes[i & 1]);
            } catch (NullPointerException expected) {
                nulls.incrementAndGet();
            }
        }
        if (found != CHECKS / 2) {
            throw new IllegalStateException("lost some that were not null");
        }
    }

    public static void main(String[] arguments) throws Exception {
        List<Socket> sockets = new ArrayList<>();
        List<Thread> echoes = new ArrayList<>();
        List<Thread> threads = new ArrayList<>();
        try (ServerSocket listener =
                new ServerSocket(0, 64, InetAddress.getByName("127.0.0.1"))) {
            for (int i = 0; i < CONNECTIONS; i++) {
                Socket client = new Socket("127.0.0.1", listener.getLocalPort());
                Socket server = listener.accept();
                int seed = i;
                sockets.add(client);
                echoes.add(start(() -> echo(server)));
                threads.add(start(() -> exchange(client, seed)));
                threads.add(start(NullChecks::check));
            }
        }
        for (Thread thread : threads) {
            thread.join();
        }
        System.out.printf("{\"failures\": %d, \"nulls\": %d, \"bytes\": %d}%n",
            failures.get(), nulls.get(), bytes.get());
        System.in.read();
        for (Socket socket : sockets) {
            socket.close();
        }
        for (Thread thread : echoes) {
            thread.join();
        }
        System.exit(failures.get() == 0 ? 0 : 1);
    }
}
